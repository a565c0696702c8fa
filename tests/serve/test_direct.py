"""What the parts of the service say to each other, whatever proxies and passwords there are."""

from __future__ import annotations

import asyncio
import builtins
import logging
import socket
import urllib.request

import httpx
import pytest

from llava.eval.browse import program as browse
from llava.gradio_pages import load_gradio
from llava.judge import Judge
from llava.serve import demo, direct, gradio_web_server, heart_beat, model_worker, service
from llava.serve.auth import read_token
from llava.serve.heart_beat import HeartBeat
from llava.serve.register_worker import post
from llava.serve.sglang_worker import served_model
from tests.eval.stub_judge import stub_judge
from tests.paths import ROOT
from tests.ports import free_port
from tests.serve.serve_tools import live, wait_for

TOKEN = "0123456789abcdef-the-secret"


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """An environment with a proxy that answers nothing, and a password for this machine."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "somewhere.example")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password something\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def replying(reply: bytes, heads: list):
    async def app(scope, receive, send):
        if scope["type"] == "http":
            heads.append(dict(scope["headers"]))
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": reply})

    return app


def test_the_environment_changes_no_request_between_the_parts(elsewhere):
    heads = []
    with live(replying(b'{"models": ["a"], "model_path": "m"}', heads)) as address:
        assert post(address, "/list_models", None, TOKEN).json()["models"] == ["a"]
        assert demo.answers(f"{address}/list_models", TOKEN, demo.has_models)
        assert served_model(address, "sglang", TOKEN) == "m"
    assert [head[b"authorization"] for head in heads] == [f"Bearer {TOKEN}".encode()] * 3


def test_the_page_starts_where_a_proxy_is_set(elsewhere, tmp_path):
    pytest.importorskip("gradio")
    args = gradio_web_server.build_parser().parse_args(["--model-list-mode", "reload"])
    page, address = gradio_web_server.launch(args, str(tmp_path))
    try:
        assert httpx.get(address, trust_env=False, timeout=60).status_code == 200
        assert urllib.request.proxy_bypass("somewhere.example"), "as before"
        assert not urllib.request.proxy_bypass("api.openai.com")
    finally:
        page.close(verbose=False)


def test_answers_are_browsed_where_a_proxy_is_set(elsewhere, tmp_path):
    pytest.importorskip("gradio")
    answers = tmp_path / "a.jsonl"
    answers.write_text('{"question_id": 1, "prompt": "Is it?", "text": "yes"}\n')
    words = [str(answers), "--benchmark", "pope", "--data-dir", str(ROOT / "playground/benchmark")]
    args = browse.build_parser().parse_args([*words, "--port", str(free_port())])
    page, address = browse.launch(args)
    try:
        assert httpx.get(address, trust_env=False, timeout=60).status_code == 200
    finally:
        page.close(verbose=False)


def test_a_judge_on_this_machine_is_asked_itself(elsewhere):
    with stub_judge(["fine"]) as server:
        assert Judge("m", server.url, attempts=1).ask(("", "Well?")) == "fine"
    assert len(server.requests) == 1


def test_a_page_says_why_gradio_does_not_load(monkeypatch):
    def fails(*_, **__):
        raise ImportError("a package for SOCKS is not installed")

    monkeypatch.setattr(builtins, "__import__", fails)
    with pytest.raises(ImportError, match="the page needs gradio, which .*: a package for SOCKS"):
        load_gradio("the page")


# --- Addresses


@pytest.mark.parametrize(
    "address", ["http://localhost:1", "https://host", "http://[::1]:5/", "http://host/behind/"]
)
def test_an_address_loses_a_slash_at_its_end_alone(address):
    assert direct.checked_address(address, "--x") == address.rstrip("/")


@pytest.mark.parametrize(
    "address",
    ["localhost:1", "http://localhost:100000", "http://localhost:1\t", "http://localhost:0"]
    + ["", "http://", "ftp://host", "http://a b", "http://user@host", "http://host?x", "http://[x"],
)
def test_what_is_no_address_is_refused_before_anything_is_loaded(address, monkeypatch):
    with pytest.raises(ValueError, match="^--x .* must have the form http://HOST:PORT$"):
        direct.checked_address(address, "--x")
    parser = model_worker.build_parser()
    for option in ("--controller-address", "--worker-address"):
        args = parser.parse_args([f"{option}={address}"])
        with pytest.raises(ValueError, match=f"^{option} "):
            model_worker.run_worker(args, lambda args: pytest.fail("it was loaded"))
    args = gradio_web_server.build_parser().parse_args([f"--controller-url={address}"])
    with pytest.raises(ValueError, match="^--controller-url "):
        gradio_web_server.build_page(args)


@pytest.mark.parametrize(
    "host, reason",
    [
        ("127.0.0.1", "^port {port} is in use, choose another one with --port$"),
        ("localhost", "^port {port} is in use"),
        ("no.such.host", "^--host no.such.host is no address of this machine: "),
        ("203.0.113.7", "^cannot listen at 203.0.113.7, port {port}: "),
    ],
)
def test_where_no_worker_can_listen_none_is_loaded(host, reason, monkeypatch):
    """A large model takes minutes."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("LLAVA_SERVE_TOKEN", TOKEN)
        given = ["--no-register", f"--host={host}", f"--port={port}"]
        args = model_worker.build_parser().parse_args(given)
        with pytest.raises(ValueError, match=reason.format(port=port)):
            model_worker.run_worker(args, lambda args: pytest.fail("it was loaded"))


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_there_is_not_is_refused(port):
    with pytest.raises(ValueError, match=f"^--port {port} must be within 0 and 65535$"):
        service.serve(None, "127.0.0.1", port)


def test_a_worker_has_an_address_without_a_path_and_with_a_port():
    parser = model_worker.build_parser()
    with pytest.raises(ValueError, match="--worker-address"):
        model_worker.own_address(parser.parse_args(["--worker-address", "http://host:1/path"]))
    with pytest.raises(ValueError, match="--port 0"):
        model_worker.own_address(parser.parse_args(["--port", "0"]))


def test_a_name_that_is_empty_is_not_taken_for_one_that_is_missing(monkeypatch):
    """As of a variable of the shell that is not set."""
    with pytest.raises(ValueError, match="--token-file is empty"):
        read_token("")
    with pytest.raises(ValueError, match="--model-path is empty"):
        demo.check_parts("")
    with pytest.raises(ValueError, match="--model-path is empty"):
        model_worker.load_engine(model_worker.build_parser().parse_args(["--model-path="]))
    with pytest.raises(ValueError, match="--worker-address '' must have the form"):
        model_worker.own_address(model_worker.build_parser().parse_args(["--worker-address="]))


@pytest.mark.parametrize("port", ["0", "65536", "-1", "x"])
@pytest.mark.parametrize("program", [demo, gradio_web_server], ids=["demo", "page"])
def test_the_page_has_a_port_that_browsers_can_be_told(program, port, capsys):
    with pytest.raises(SystemExit):
        program.build_parser().parse_args([f"--port={port}"])
    assert "port" in capsys.readouterr().err
    assert program.build_parser().parse_args(["--port", "1"]).port == 1


# --- The heart beat


def beat_until(done, controller: str, transport=None) -> None:
    """Runs a heart beat that is impatient until `done()`."""

    async def run():
        status = {"queue_length": 0, "model_names": ["a"], "speed": 1}
        beating = HeartBeat(controller, "http://localhost:1", lambda: status, transport=transport)
        task = asyncio.ensure_future(beating.run())
        await asyncio.to_thread(wait_for, lambda: task.done() or done())
        assert not task.done(), "it stopped"
        task.cancel()
        await beating.leave()

    asyncio.run(run())


@pytest.fixture
def impatient(monkeypatch):
    for name in ("RETRY_SECONDS", "LEAST_SECONDS", "WORKER_HEART_BEAT_INTERVAL"):
        monkeypatch.setattr(heart_beat, name, 0.01)


@pytest.mark.parametrize(
    "address", ["http://localhost:100000", "localhost:1", "http://localhost:1\t"]
)
def test_a_heart_beat_to_what_is_no_address_is_said_and_tried_again(address, impatient, caplog):
    with caplog.at_level(logging.WARNING):
        beat_until(lambda: len(caplog.records) > 2, address)


@pytest.mark.parametrize("reply", [b"{}", b"[]", b"null", b"7", b"{"])
def test_a_reply_that_is_none_of_a_controller_does_not_end_the_heart_beat(reply, impatient):
    asked = []

    def answer(request):
        asked.append(request.url.path)
        return httpx.Response(200, content=b"null" if "register" in asked[-1] else reply)

    transport = httpx.MockTransport(answer)
    beat_until(lambda: asked.count("/receive_heart_beat") > 2, "http://c", transport)


def test_an_error_that_nobody_thought_of_does_not_end_the_heart_beat(impatient, caplog):
    def fail(request):
        raise OverflowError("secret")

    with caplog.at_level(logging.WARNING):
        beat_until(lambda: len(caplog.records) > 2, "http://c", httpx.MockTransport(fail))
    assert "OverflowError" in caplog.text and "secret" not in caplog.text
