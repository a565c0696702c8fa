"""A worker whose language model is in a server: the page and its clients see no difference."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from llava.engine import VLLMEngine
from llava.pruning import METHODS
from llava.serve import model_worker
from llava.serve.engine import Engine
from llava.serve.worker_app import Places, worker_app
from tests.engine.stub_vllm import stub_vllm
from tests.model.checkpoint_tools import CHECKPOINT, load
from tests.paths import GOLDEN
from tests.serve.serve_tools import (
    START_SECONDS,
    STREAM,
    ask,
    ask_and_leave,
    body,
    call,
    chunks_of,
    live,
    outcome,
    patient_post,
    wait_for,
)

NAME = "tiny-llava-v1.5"
ASKED = [
    {"method": "none"},
    {"method": "vispruner", "visual_token_num": 32},
    {"method": "divprune", "visual_token_num": 90},
    {"method": "visionzip", "visual_token_num": 64},
]


@pytest.fixture(scope="module")
def image():
    return base64.b64encode((GOLDEN / "images" / "img1_640x360.png").read_bytes()).decode()


def engine_of(**options) -> Engine:
    tokenizer, model, processor, _ = load(CHECKPOINT, **options)
    model.generation_config.eos_token_id = -1
    return Engine(tokenizer, model, processor, NAME, concurrency=8)


@pytest.fixture(scope="module")
def server():
    with stub_vllm(load(CHECKPOINT)[1]) as server:
        yield server


@pytest.fixture(scope="module")
def alone():
    """A worker with all of its model."""
    engine = engine_of()
    yield worker_app(engine, Places(20))
    engine.close()


@pytest.fixture(scope="module")
def worker(server):
    """One whose language model is in the server."""
    engine = engine_of(engine=VLLMEngine(server.url))
    yield engine
    engine.close()


@pytest.fixture
def app(worker, monkeypatch):
    monkeypatch.setattr(worker, "close", lambda: None)  # servers come and go, it stays
    return worker_app(worker, Places(20))


def test_answers_and_reports_are_those_of_a_worker_with_all_of_its_model(app, alone, image):
    for pruning in ASKED:
        changes = {"images": [image], "pruning": pruning, "max_new_tokens": 6}
        expected = outcome(ask(alone, **changes))
        chunks = ask(app, **changes)
        assert ["pruning_report" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [1]
        assert len(chunks) > 2 and outcome(chunks) == expected
    assert outcome(ask(app)) == outcome(ask(alone))  # without an image


def test_requests_with_different_methods_at_the_same_time_do_not_see_each_other(app, image):
    single = [outcome(ask(app, images=[image], pruning=pruning)) for pruning in ASKED]
    with live(app) as address, ThreadPoolExecutor(len(ASKED)) as pool:

        def post(pruning):
            content = body(images=[image], pruning=pruning)
            return httpx.post(address + STREAM, json=content, timeout=60).content

        together = [outcome(chunks_of(data)) for data in pool.map(post, ASKED)]
    assert together == single


def test_methods_that_cannot_go_this_way_are_listed_with_the_reason_and_refused(app, image):
    (reply,) = call(app, ("/worker_get_status", None))
    listed = {entry["name"]: entry for entry in reply.json()["pruning_methods"]}
    assert listed.keys() == METHODS.keys()
    assert listed["vispruner"]["available"] and not listed["fastv"]["available"]
    assert "inside the decoder" in listed["fastv"]["reason"]
    (reply,) = call(app, (STREAM, body(images=[image], pruning={"method": "fastv"})))
    (chunk,) = chunks_of(reply.content)
    assert (reply.status_code, chunk["cause"]) == (400, "method_unavailable")
    assert "inside the decoder" in chunk["text"]


def test_no_request_waits_for_the_answer_of_another(app, server, image, monkeypatch):
    monkeypatch.setattr(server, "together", 6)
    monkeypatch.setattr(server, "most", 0)

    def post(_):
        content = body(images=[image], max_new_tokens=8)
        data = httpx.post(address + STREAM, json=content, timeout=START_SECONDS)
        return chunks_of(data.content)[-1]["error_code"]

    with live(app) as address, ThreadPoolExecutor(6) as pool:
        assert list(pool.map(post, range(6))) == [0] * 6
        assert server.most == 6


def test_what_a_client_that_leaves_had_asked_for_ends_in_the_server(app, server, monkeypatch):
    monkeypatch.setattr(server, "pause", 0.05)
    monkeypatch.setattr(server, "ended", 0)
    with live(app) as address:

        def queue():
            return patient_post(f"{address}/worker_get_status").json()["queue_length"]

        content = body(max_new_tokens=1000)
        with httpx.stream("POST", address + STREAM, json=content, timeout=60) as reply:
            pieces = reply.iter_raw()
            next(pieces)
            assert queue() == 1 and server.under_way == 1
        wait_for(lambda: queue() == 0 and server.ended == 1 and server.under_way == 0)


def test_a_client_that_leaves_before_the_first_token_is_noticed(app, server, monkeypatch):
    monkeypatch.setattr(server, "pause", 2.0)
    monkeypatch.setattr(server, "ended", 0)
    with live(app) as address:
        ask_and_leave(address, lambda: server.under_way == 1, max_new_tokens=100)
        wait_for(lambda: server.ended == 1)


def test_a_stop_text_ends_the_answer_here_and_in_the_server(app, server, monkeypatch):
    whole = ask(app, max_new_tokens=8)[-1]["text"]
    answer = whole[len(body()["prompt"]) :]
    stop = answer[4:6]
    monkeypatch.setattr(server, "pause", 0.05)
    monkeypatch.setattr(server, "ended", 0)
    chunks = ask(app, max_new_tokens=500, stop=stop)
    assert chunks[-1]["text"] == body()["prompt"] + answer[: answer.find(stop)]
    assert "pruning_report" in chunks[-1]
    wait_for(lambda: server.ended == 1)


def test_a_server_that_dies_in_the_middle_is_said_to_be_gone(app, server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(server, "die_after", 2)
        chunk = ask(app, max_new_tokens=8)[-1]
    assert (chunk["cause"], chunk["error_code"]) == ("worker_died", 3)
    assert "gone" in chunk["text"] and "127.0.0.1" not in chunk["text"]
    assert ask(app)[-1]["error_code"] == 0  # it is back


def test_a_request_that_the_server_refuses_is_said_to_be(app, server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(server, "takes_embeddings", False)
        chunk = ask(app)[-1]
    assert chunk["cause"] == "bad_request" and "refused" in chunk["text"]
    assert "enable" not in chunk["text"]


def test_sampling_is_passed_on(app, server):
    ask(app, temperature=0.7, top_p=0.9)
    sent = server.requests[-1]
    assert (sent["temperature"], sent["top_p"], sent["max_tokens"]) == (0.7, 0.9, 4)
    ask(app, temperature=0.7, top_p=0)  # of no tokens, which a server would refuse
    assert server.requests[-1]["temperature"] == 0


def test_a_worker_with_a_server_answers_more_requests_at_the_same_time(server):
    def concurrency(line):
        return model_worker.concurrency(model_worker.build_parser().parse_args(line.split()))

    remote = f"--engine vllm --engine-url {server.url}"
    assert concurrency("") == 5 and concurrency(remote) == 64
    assert concurrency("--limit-model-concurrency 3") == 3
    assert concurrency(f"{remote} --limit-model-concurrency 3") == 3


def test_a_worker_starts_with_its_method_on_the_way_to_the_server(server):
    line = f"--model-path {CHECKPOINT} --model-name {NAME} --device cpu --pruning-method vispruner"
    line += f" --engine vllm --engine-url {server.url}"
    engine = model_worker.load_engine(model_worker.build_parser().parse_args(line.split()))
    try:
        assert engine.model.engine is not None
        assert engine.shelf.default.name == "vispruner"
    finally:
        engine.close()


def test_a_worker_says_at_its_start_that_a_method_cannot_go_this_way(server):
    line = f"--model-path {CHECKPOINT} --model-name {NAME} --device cpu --pruning-method fastv"
    line += f" --engine vllm --engine-url {server.url}"
    with pytest.raises(ValueError, match="inside the decoder"):
        model_worker.load_engine(model_worker.build_parser().parse_args(line.split()))
