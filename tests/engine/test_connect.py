"""A server is asked before the first prompt whether it has the right model, and what is wrong is
said in a sentence."""

from __future__ import annotations

import copy
import json
import socket

import pytest
import torch

from llava.engine import EngineError, VLLMEngine
from llava.engine.options import engine_from_args
from llava.eval import run_llava
from tests.engine.stub_vllm import stub_vllm
from tests.model.checkpoint_tools import CHECKPOINT, load
from tests.ports import free_port


@pytest.fixture(scope="module")
def decoder():
    return load(CHECKPOINT)[1]


def connected(server, **options):
    return load(CHECKPOINT, engine=VLLMEngine(server.url, **options))[1]


def test_a_server_with_the_language_model_is_taken(decoder):
    with stub_vllm(decoder) as server:
        model = connected(server, key="a-secret")
    assert [set(body) & {"prompt", "prompt_embeds"} for body in server.requests] == [
        {"prompt_embeds"},
        {"prompt"},
    ]
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer a-secret"}
    assert set(server.paths) == {"/v1/completions"}
    assert model.engine.places[0].positions == server.positions


def test_a_server_that_is_away_is_named_before_the_weights_are_read(monkeypatch):
    monkeypatch.setattr("llava.model.builder.build_empty", None)
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EngineError, match=f"no server answers at {url} .*: is it running"):
        load(CHECKPOINT, engine=VLLMEngine(url))


def test_a_server_without_the_flag_is_told_to_have_it(decoder):
    with stub_vllm(decoder, takes_embeddings=False) as server:
        with pytest.raises(ValueError, match="was started without --enable-prompt-embeds. Start"):
            connected(server)


def test_a_server_that_sends_no_token_ids_is_too_old(decoder):
    with stub_vllm(decoder, sends_ids=False) as server:
        with pytest.raises(EngineError, match="sends no token ids: its vLLM is too old"):
            connected(server)


def test_a_server_with_other_embeddings_has_another_model(decoder):
    other = copy.deepcopy(decoder)
    torch.manual_seed(0)
    other.model.embed_tokens.weight.data = torch.randn_like(decoder.model.embed_tokens.weight)
    with stub_vllm(other) as server:
        with pytest.raises(ValueError, match="serves another model .*continues the same tokens"):
            connected(server)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers"])
def test_a_server_that_loaded_a_model_of_other_sizes_has_another(decoder, tmp_path, key):
    values = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    here = {name: getattr(decoder.config, name) for name in ("hidden_size", "vocab_size")}
    here["num_hidden_layers"] = decoder.config.num_hidden_layers
    there = here | {key: here[key] + 8}
    (tmp_path / "config.json").write_text(json.dumps(values | there))
    with stub_vllm(decoder, root=str(tmp_path)) as server:
        match = f"serves another model: {tmp_path} has {key} {there[key]}, the checkpoint here"
        with pytest.raises(ValueError, match=match):
            connected(server)
        assert server.requests == []
        (tmp_path / "config.json").write_text(json.dumps(values | here))
        connected(server)


def test_what_is_no_vllm_is_not_taken_for_one(decoder):
    class Other(dict):
        pass

    with stub_vllm(decoder, positions=2048) as server:
        server.RequestHandlerClass = type(
            "Other", (server.RequestHandlerClass,), {"do_GET": lambda self: self.send(404, {})}
        )
        with pytest.raises(ValueError, match="refuses with status 404.* Is it vLLM"):
            connected(server)
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, pytest.raises(EngineError, match="was silent for 0.2 s"):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        load(CHECKPOINT, engine=VLLMEngine(url, seconds=0.2))


@pytest.mark.parametrize(
    "url", ["127.0.0.1:80", "ftp://127.0.0.1", "http://127.0.0.1/x", "http://u@127.0.0.1", "", "a"]
)
def test_addresses_have_one_form(url):
    with pytest.raises(ValueError, match="must have the form http://HOST:PORT"):
        VLLMEngine(url)


@pytest.mark.parametrize("url", ["http://10.0.0.7:8000", "http://gpu-box:8000/v1"])
def test_servers_on_other_machines_have_to_be_allowed(url):
    with pytest.raises(ValueError, match="is not on this machine: .* --allow-engine"):
        VLLMEngine(url)
    with pytest.raises(ValueError, match="is not on this machine"):
        VLLMEngine(url, ["10.0.0.7:1", "gpu-box:1"])
    VLLMEngine(url, ["10.0.0.7:8000", "gpu-box"])
    with pytest.raises(ValueError, match="'http://gpu-box' must have the form HOST or HOST:PORT"):
        VLLMEngine(url, ["http://gpu-box"])


@pytest.mark.parametrize("url", ["http://localhost:8000", "http://[::1]:8000", "https://127.0.0.2"])
def test_this_machine_needs_no_allowance(url):
    assert VLLMEngine(url).servers[0].url.startswith(url)


def test_redirects_are_not_followed(decoder):
    with stub_vllm(decoder) as server, stub_vllm(decoder) as elsewhere:

        def moved(self):
            self.send_response(307)
            self.send_header("Location", elsewhere.url + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()

        kind = type("Moved", (server.RequestHandlerClass,), {"do_GET": moved})
        server.RequestHandlerClass = kind
        with pytest.raises(ValueError, match="refuses with status 307"):
            connected(server)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_proxies_of_the_environment_are_not_used(decoder, monkeypatch, variable):
    monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")
    with stub_vllm(decoder) as server:
        connected(server)


def parsed(*words):
    parser = run_llava.build_parser()
    return parser.parse_args(words)


def test_options_belong_together(tmp_path):
    assert engine_from_args(parsed()) is None
    given = {"--engine-url": "http://127.0.0.1:1", "--allow-engine": "h", "--engine-key-file": "k"}
    for option, value in given.items():
        with pytest.raises(ValueError, match=f"{option} is about a server, but --engine vllm is"):
            engine_from_args(parsed(option, value))
    with pytest.raises(ValueError, match="needs the address of the server: --engine-url"):
        engine_from_args(parsed("--engine", "vllm"))
    (tmp_path / "key").write_text("a-secret\n")
    words = ["--engine", "vllm", "--engine-url", "http://gpu-box:8000", "--allow-engine", "gpu-box"]
    engine = engine_from_args(parsed(*words, "--engine-key-file", str(tmp_path / "key")))
    assert engine.servers[0].key == "a-secret" and engine.servers[0].host == "gpu-box"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"load_8bit": True}, "load_8bit and load_4bit is about the decoder layers"),
        ({"compile": True}, "compile is about the decoder layers"),
    ],
)
def test_options_about_decoder_layers_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        load(CHECKPOINT, engine=VLLMEngine("http://127.0.0.1:9"), **options)


def test_run_llava_prints_the_answer_of_the_server(decoder, capsys):
    words = ["--model-path", str(CHECKPOINT), "--device", "cpu", "--temperature", "0"]
    words += ["--max-new-tokens", "4", "--pruning-method", "vispruner"]
    run_llava.eval_model(run_llava.build_parser().parse_args(words))
    with stub_vllm(decoder) as server:
        words += ["--engine", "vllm", "--engine-url", server.url]
        run_llava.eval_model(run_llava.build_parser().parse_args(words))
        assert "prompt_embeds" in server.requests[-1]
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
