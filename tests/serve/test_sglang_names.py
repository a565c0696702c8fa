"""What the server behind an `sglang_worker` calls its model, what clients call it, and what of
their requests it is not told."""

from __future__ import annotations

import json

import pytest

from llava.serve import sglang_worker
from llava.serve.sglang_worker import Forwarder, build_parser, load_forwarder
from tests.serve.serve_tools import live
from tests.serve.test_programs import ask_forwarder, sse, upstream

REPLIES = {
    "sglang": {"model_path": "org/llava-v1-7b"},
    "openai": {"data": [{"id": "org/llava-v1-7b"}]},
}


def server(reply: dict):
    async def app(scope, receive, send):
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": json.dumps(reply).encode()})

    return live(app)


def load(address: str, *options: str):
    return load_forwarder(build_parser().parse_args(["--sgl-endpoint", address, *options]))


@pytest.mark.parametrize("api", REPLIES)
def test_a_model_has_the_last_part_of_the_name_that_the_server_knows(api):
    with server(REPLIES[api]) as address:
        forwarder = load(address, "--api", api)
    assert (forwarder.model_name, forwarder.served) == ("llava-v1-7b", "org/llava-v1-7b")
    assert forwarder.conv_mode == "vicuna_v1"


def test_what_clients_call_a_model_does_not_choose_its_template():
    with server(REPLIES["sglang"]) as address:
        forwarder = load(address, "--model-name", "my-mpt")
    assert (forwarder.model_name, forwarder.conv_mode) == ("my-mpt", "vicuna_v1")


def test_a_server_that_does_not_say_what_it_serves_has_the_model_that_was_named():
    with server({}) as address:
        forwarder = load(address, "--model-name", "llava-v1-7b")
        with pytest.raises(ValueError, match="Or pass --model-name"):
            load(address)
    assert (forwarder.model_name, forwarder.conv_mode) == ("llava-v1-7b", "vicuna_v1")


def test_an_openai_server_is_asked_for_its_model_by_the_whole_name():
    seen = []
    transport = upstream(sse("[DONE]"), seen)
    forwarder = sglang_worker.Forwarder(
        "http://s", "llava-v1-7b", "openai", transport=transport, served="org/llava-v1-7b"
    )
    ask_forwarder(forwarder, model="llava-v1-7b")
    ((_, sent),) = seen
    assert sent["model"] == "org/llava-v1-7b"


@pytest.mark.parametrize("api", REPLIES)
def test_a_request_for_the_likeliest_tokens_names_no_share_of_nothing(api):
    """`top_p: 0` means that here, and is refused by most servers."""
    seen = []
    transport = upstream(sse("[DONE]"), seen)
    forwarder = sglang_worker.Forwarder("http://s", "m", api, transport=transport)
    ask_forwarder(forwarder, top_p=0, temperature=0.7)
    ((_, sent),) = seen
    sampling = sent.get("sampling_params", sent)
    assert (sampling["temperature"], sampling["top_p"]) == (0, 1)


@pytest.mark.parametrize("endpoint", ["localhost:30000", "http://localhost:300000", ""])
def test_an_endpoint_that_is_no_address_is_refused(endpoint):
    with pytest.raises(ValueError, match="^--sgl-endpoint .* must have the form http"):
        load(endpoint, "--model-name", "m")


def test_keys_of_a_request_that_the_server_is_not_told_are_named():
    answer = sse({"text": "A cat"}, "[DONE]")
    forwarder = Forwarder("http://s", "m", transport=upstream(answer, []))
    _, chunks = ask_forwarder(forwarder, top_k=5)
    assert all(chunk["ignored"] == ["top_k"] for chunk in chunks)
