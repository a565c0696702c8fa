"""The programs around the service: flags, registering by hand, the test message, SGLang, demo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from llava import playground
from llava.conversation import conv_templates
from llava.model import placement
from llava.serve import (
    controller,
    demo,
    model_worker,
    register_worker,
    sglang_worker,
    test_message,
)
from llava.serve.sglang_worker import Forwarder, messages, served_model
from tests.paths import ROOT
from tests.repeated import others_slow
from tests.serve.serve_tools import (
    PROMPT,
    START_SECONDS,
    body,
    call,
    chunks_of,
    free_port,
    live,
    live_controller,
    patient_post,
    png,
    wait_for,
    words_app,
)

STREAM = "/worker_generate_stream"
#: the flags of the published programs, as their documents write them
PUBLISHED = {
    controller: "--host 0.0.0.0 --port 10000 --dispatch-method lottery",
    model_worker: "--host 0.0.0.0 --controller http://localhost:10000 --port 40000 --worker "
    "http://localhost:40000 --model-path p --model-base b --model-name n --device cuda "
    "--multi-modal --limit-model-concurrency 5 --stream-interval 1 --no-register --load-8bit "
    "--load-4bit --use-flash-attn",
    sglang_worker: "--host 0.0.0.0 --controller http://localhost:10000 --port 40000 --worker "
    "http://localhost:40000 --sgl-endpoint http://127.0.0.1:30000 --model-name n "
    "--limit-model-concurrency 5 --stream-interval 1 --no-register",
    register_worker: "--controller-address http://c --worker-name http://w --check-heart-beat",
    test_message: "--controller-address http://c --worker-address http://w --model-name n "
    "--max-new-tokens 32 --message hello",
}


@pytest.mark.parametrize("program", PUBLISHED, ids=lambda program: program.__name__)
def test_the_published_flags_are_understood(program):
    args = program.build_parser().parse_args(PUBLISHED[program].split())
    if program in (model_worker, sglang_worker):
        assert args.controller_address == "http://localhost:10000"
        assert args.worker_address == "http://localhost:40000"


def test_defaults_are_the_published_ones():
    args = controller.build_parser().parse_args([])
    assert (args.host, args.port, args.dispatch_method) == ("localhost", 21001, "shortest_queue")
    args = model_worker.build_parser().parse_args([])
    assert (args.port, model_worker.concurrency(args)) == (21002, 5)
    assert args.controller_address == "http://localhost:21001"


def test_a_worker_must_say_how_others_can_call_it():
    def address(line):
        return model_worker.own_address(model_worker.build_parser().parse_args(line.split()))

    assert address("--port 5") == "http://localhost:5"
    assert address("--host ::1 --port 5") == "http://[::1]:5"
    assert address("--host 0.0.0.0 --worker http://me:7") == "http://me:7"
    with pytest.raises(ValueError, match="--worker-address"):
        address("--host 0.0.0.0")


def test_what_loading_says_is_no_error_in_the_log_of_a_worker(capsys, caplog, monkeypatch):
    monkeypatch.setattr(placement, "cpu_multiplies_bfloat16", lambda: False)
    with caplog.at_level("INFO"):
        model_worker.load_engine(model_worker.build_parser().parse_args(["--device", "cpu"]))
    said = [record for record in caplog.records if "Running in float32" in record.message]
    assert [record.levelname for record in said] == ["INFO"]
    assert "Running in" not in capsys.readouterr().err


def test_a_trained_part_belongs_to_a_method():
    assert model_worker.trained_parts(["twigvlm=/x=y"]) == {"twigvlm": "/x=y"}
    for wrong in ("twigvlm", "twigvlm=", "fastv=/x", "magic=/x"):
        with pytest.raises(ValueError, match="--trained-part"):
            model_worker.trained_parts([wrong])


def run_program(program, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["program", *map(str, arguments)])
    program.main()


def test_a_worker_can_be_registered_by_hand(monkeypatch):
    with live(words_app()) as worker, live_controller() as (address, known):
        flags = ["--controller", address, "--worker-name", worker]
        run_program(register_worker, monkeypatch, *flags)
        assert list(known.table.workers) == [worker]
        assert not known.table.workers[worker].check_heart_beat
        flags[-1] = "http://evil.example:1"
        with pytest.raises(SystemExit, match="not allowed"):
            run_program(register_worker, monkeypatch, *flags)
        flags[-1] = "http://127.0.0.1:9"
        with pytest.raises(SystemExit, match="not registered: is it running"):
            run_program(register_worker, monkeypatch, *flags)
        assert list(known.table.workers) == [worker]


def test_the_test_message_shows_the_answer(monkeypatch, capsys):
    with live(words_app()) as worker, live_controller() as (address, _):
        flags = ["--controller", address, "--worker-name", worker]
        run_program(register_worker, monkeypatch, *flags)
        run_program(test_message, monkeypatch, "--controller", address, "--model-name", "echo")
        out = capsys.readouterr().out
        assert "Models: ['echo']" in out and out.endswith("one two three\n")
        with pytest.raises(SystemExit, match="no worker serves 'other'"):
            run_program(test_message, monkeypatch, "--controller", address, "--model-name", "other")


def test_a_test_message_to_nobody_says_what_is_wrong_with_the_address(monkeypatch):
    address = f"http://127.0.0.1:{free_port()}"
    said = {"localhost:9": "--worker-address 'localhost:9' must have the form http://HOST:PORT"}
    said[address] = f"no worker answers at {address} "
    for place, message in said.items():
        with pytest.raises(SystemExit, match=f"error: {message}"):
            run_program(test_message, monkeypatch, "--worker-address", place)
    with pytest.raises(SystemExit, match="--controller-address 'localhost:9' must have the form"):
        run_program(test_message, monkeypatch, "--controller-address", "localhost:9")


def test_the_test_message_stops_where_the_template_ends():
    assert test_message.request_body("llava-v1.5-7b", "Hi", 8)["stop"] == "</s>"
    assert test_message.request_body("llava-v0", "Hi", 8)["stop"] == "###"


@pytest.mark.parametrize(
    "package, program", others_slow([("fastapi", "controller"), ("httpx_sse", "sglang_worker")])
)
def test_a_missing_extra_is_named_and_the_chat_in_a_terminal_works_without(package, program):
    code = (
        f"import sys; sys.modules['{package}'] = None; import llava.serve.cli; "
        f"import llava.serve.{program}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "extra `serve`: pip install -e '.[serve]'" in done.stderr.splitlines()[-1]


def test_a_log_file_is_written_where_it_is_asked_for(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "llava.serve.controller", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--log-dir", str(tmp_path)]
    running = subprocess.Popen(command, cwd=ROOT)
    try:
        wait_for(lambda: demo.is_listening("127.0.0.1", port), START_SECONDS)
        content = {
            "worker_name": "http://127.0.0.1:1",
            "check_heart_beat": False,
            "worker_status": {"model_names": ["echo"], "speed": 1, "queue_length": 0},
        }
        patient_post(f"http://127.0.0.1:{port}/register_worker", json=content)
    finally:
        running.send_signal(signal.SIGTERM)
        assert running.wait(120) in (0, -signal.SIGTERM)
    assert "registered http://127.0.0.1:1" in (tmp_path / "controller.log").read_text()


# --- A server behind a worker


def sse(*events) -> bytes:
    lines = [
        f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events
    ]
    return "".join(lines).encode()


def upstream(content, seen: list, status: int = 200, kind: str = "text/event-stream"):
    def reply(request):
        seen.append((request.url.path, json.loads(request.content)))
        return httpx.Response(status, content=content, headers={"content-type": kind})

    return httpx.MockTransport(reply)


def ask_forwarder(forwarder, **changes) -> tuple[int, list[dict]]:
    (reply,) = call(words_app(forwarder), (STREAM, body(**changes)))
    return reply.status_code, chunks_of(reply.content)


def test_an_sglang_server_gets_prompt_and_images_and_its_text_comes_back():
    seen, content = [], sse({"text": "A"}, {"text": "A cat"}, "[DONE]")
    forwarder = Forwarder("http://s", "llava-v1.5-7b", transport=upstream(content, seen))
    image = png()
    _, chunks = ask_forwarder(forwarder, images=[image], prompt="USER: <image>\nWhat? ASSISTANT:")
    assert [chunk["text"].split("ASSISTANT:")[1] for chunk in chunks] == ["A", "A cat"]
    ((path, sent),) = seen
    assert path == "/generate" and sent["image_data"] == [image] and sent["stream"]
    assert sent["text"] == "USER:<image>What? ASSISTANT:"
    assert sent["sampling_params"] == {
        "max_new_tokens": 4,
        "temperature": 0,
        "top_p": 1.0,
        "stop": "</s>",
    }


def test_an_openai_server_gets_messages():
    pieces = [{"choices": [{"delta": {"content": text}}]} for text in ("A", " cat")]
    content = sse({"choices": [{"delta": {"role": "assistant"}}]}, *pieces, "[DONE]")
    seen = []
    server = "http://s/v1"  # as such addresses are often written
    forwarder = Forwarder(server, "llava-v1.5-7b", "openai", transport=upstream(content, seen))
    image = png(format="JPEG")
    prompt = "Be good. USER: <image>\nWhat? ASSISTANT: A dog.</s>USER: Sure? ASSISTANT:"
    _, chunks = ask_forwarder(forwarder, images=[image], prompt=prompt)
    assert chunks[-1]["text"] == prompt + "A cat"
    ((path, sent),) = seen
    assert path == "/v1/chat/completions" and sent["model"] == "llava-v1.5-7b"
    system, user, assistant, again = sent["messages"]
    assert system == {"role": "system", "content": "Be good."}
    assert [part["type"] for part in user["content"]] == ["image_url", "text"]
    assert user["content"][0]["image_url"]["url"] == f"data:image/jpeg;base64,{image}"
    assert (assistant["role"], assistant["content"][0]["text"]) == ("assistant", "A dog.")
    assert again["content"] == [{"type": "text", "text": "Sure?"}]


@pytest.mark.parametrize("api", ["sglang", "openai"])
def test_a_server_gets_plain_base64_whatever_came(api):
    image, seen = png(format="JPEG"), []
    forwarder = Forwarder("http://s", "llava-v1.5-7b", api, transport=upstream(sse(), seen))
    wrapped = "data:image/jpeg;base64," + image[:40] + "\r\n" + image[40:]
    ask_forwarder(forwarder, images=[wrapped], prompt="USER: <image>\nWhat? ASSISTANT:")
    ((_, sent),) = seen
    if api == "sglang":
        assert sent["image_data"] == [image]
    else:
        url = sent["messages"][0]["content"][0]["image_url"]["url"]
        assert url == f"data:image/jpeg;base64,{image}"


FAILURES = {
    "the server fails": (b"", 500, "internal"),
    "the server refuses": (b"", 400, "bad_request"),
    "the server has no time": (b"", 429, "busy"),
    "the answer is none": (sse({"other": 1}), 200, "internal"),
    "the answer is no JSON": (b"data: {\n\n", 200, "internal"),
}


@pytest.mark.parametrize("content, status, cause", FAILURES.values(), ids=FAILURES.keys())
def test_a_server_that_fails_is_said_to(content, status, cause):
    forwarder = Forwarder("http://s", "m", transport=upstream(content, [], status))
    _, chunks = ask_forwarder(forwarder)
    assert [chunk["cause"] for chunk in chunks] == [cause]


def test_events_may_have_every_spelling_that_the_standard_knows():
    content = b': hello\r\n\r\nevent: piece\rdata:{"text":\rdata: "A cat"}\r\rid: 7\n\n'
    forwarder = Forwarder("http://s", "m", transport=upstream(content + sse("[DONE]"), []))
    _, (chunk,) = ask_forwarder(forwarder, prompt="Hi ")
    assert chunk["text"] == "Hi A cat"


def test_an_event_that_never_ends_and_a_reply_that_is_no_stream_are_no_answers(monkeypatch):
    monkeypatch.setattr(sglang_worker, "CHUNK_BYTES", 1000)
    read = []

    async def endless():
        for number in range(100):
            read.append(number)
            yield b"x" * 100 + (b"\ndata: " if number % 3 else b"")

    for transport in (upstream(endless(), []), upstream(b"<html>", [], kind="text/html")):
        _, (chunk,) = ask_forwarder(Forwarder("http://s", "m", transport=transport))
        assert chunk["cause"] == "internal" and "no answer" in chunk["text"]
    assert len(read) < 20
    long = sse(*({"text": "A" * 50 * number} for number in range(1, 15)))  # 6 KB in 14 events
    _, chunks = ask_forwarder(Forwarder("http://s", "m", transport=upstream(in_pieces(long), [])))
    assert len(chunks) == 14


async def in_pieces(content: bytes, size: int = 100):
    for start in range(0, len(content), size):
        yield content[start : start + size]


def test_a_server_that_is_gone_is_said_to_be():
    def gone(request):
        raise httpx.ConnectError("no route to 10.0.0.1")

    _, (chunk,) = ask_forwarder(Forwarder("http://s", "m", transport=httpx.MockTransport(gone)))
    assert chunk["cause"] == "worker_died" and "10.0" not in chunk["text"]


def test_a_request_to_prune_is_refused_where_nothing_prunes():
    forwarder = Forwarder("http://s", "m", transport=upstream(b"", []))
    status, (chunk,) = ask_forwarder(forwarder, pruning={"method": "random"})
    assert (status, chunk["cause"]) == (400, "method_unavailable")
    status, (chunk,) = ask_forwarder(forwarder, prompt=PROMPT)
    assert (status, chunk["cause"]) == (400, "image_count")


@pytest.mark.parametrize(
    "api, path, reply",
    [
        ("sglang", "/get_model_info", {"model_path": "org/llava-v1.5-7b"}),
        ("openai", "/v1/models", {"data": [{"id": "llava-v1.5-7b"}]}),
    ],
)
def test_the_server_is_asked_what_it_serves(api, path, reply):
    async def app(scope, receive, send):
        if scope["type"] == "http":
            status = 200 if scope["path"] == path else 404
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": json.dumps(reply).encode()})

    with live(app) as address:
        assert served_model(address, api) == "llava-v1.5-7b"
    with pytest.raises(ValueError, match="pass --model-name"):
        served_model("http://127.0.0.1:9", api)


def test_messages_of_a_prompt_without_roles_are_one_message():
    job = sglang_worker.Job(model_worker_request("Hello"), "id", [])
    (message,) = messages(job, conv_templates["plain"])
    assert message == {"role": "user", "content": [{"type": "text", "text": "Hello"}]}


def model_worker_request(prompt: str):
    from llava.serve.protocol import GenerateRequest

    return GenerateRequest(prompt=prompt)


# --- The demo


def test_the_demo_says_when_its_port_is_taken_or_a_part_ends(monkeypatch):
    with live(words_app()) as address:
        port = address.rsplit(":", 1)[1]
        with pytest.raises(SystemExit, match=f"port {port} is in use"):
            run_program(demo, monkeypatch, "--port", port)
    everything = demo.Demo(dict(os.environ))
    everything.start("controller", "--no-such-flag")
    with pytest.raises(ValueError, match="controller ended .exit code 2"):
        everything.wait_until(lambda: False)
    everything.stop()


def test_parts_that_do_not_end_are_stopped_together_and_in_time(monkeypatch):
    assert demo.STOP_SECONDS <= 10  # of the 15 that service managers give
    monkeypatch.setattr(demo, "STOP_SECONDS", 1)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    stubborn += "print(flush=True); time.sleep(600)"
    everything = demo.Demo(dict(os.environ))
    for name in "abcde":
        command = [sys.executable, "-c", stubborn]
        everything.processes[name] = subprocess.Popen(command, stdout=subprocess.PIPE)
    for process in everything.processes.values():
        process.stdout.readline()
    began = time.monotonic()
    everything.stop()
    assert time.monotonic() - began < 5 * 10, "one after the other"
    assert all(one.returncode == -signal.SIGKILL for one in everything.processes.values())
    for process in everything.processes.values():
        process.stdout.close()


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


needs_playground_and_proc = pytest.mark.skipif(
    not (playground.ROOT / playground.CHECKPOINT / "config.json").is_file()
    or not Path("/proc").is_dir(),
    reason="needs the playground checkpoint and /proc",
)


@pytest.mark.slow
@needs_playground_and_proc
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_demo_without_room_for_its_output_runs_and_stops_with_visitors_on_the_page(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "llava.serve.demo", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with open("/dev/full", "w") as full:
        running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=full, stderr=full)
    try:
        wait_for(
            lambda: running.poll() is None and demo.is_listening("127.0.0.1", port), START_SECONDS
        )
        page = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=page, timeout=60) as visitor:
            assert visitor.get("/").status_code == 200
            with visitor.stream("GET", "/gradio_api/heartbeat/visitor") as stays:
                next(stays.iter_raw())
                parts = children(running.pid)
                assert running.poll() is None and len(parts) == 3
                began = time.monotonic()
                running.send_signal(signal.SIGTERM)
                assert running.wait(120) == 0
        assert time.monotonic() - began < demo.STOP_SECONDS + 60  # visitors would stay for ever
        assert not any(map(is_running, parts)) and list(tmp_path.iterdir()) == []
    finally:
        running.kill()


@pytest.mark.slow
@needs_playground_and_proc
def test_the_demo_starts_with_one_command_and_leaves_nothing_behind(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "llava.serve.demo", "--port", str(port), "--device", "cpu"]
    # A shell makes what it starts in the background ignore Ctrl-C, and that is inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with (tmp_path / "errors").open("w") as errors:
        running = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    signal.signal(signal.SIGINT, before)
    try:
        line = ""
        while "The demo is at" not in line:
            line = running.stdout.readline()
            assert line, "the demo ended"
        assert f"http://127.0.0.1:{port}" in line
        assert httpx.get(f"http://127.0.0.1:{port}", timeout=60).status_code == 200
        parts = children(running.pid)
        assert len(parts) == 3
        began = time.monotonic()
        os.killpg(running.pid, signal.SIGINT)  # to all of them, as Ctrl-C in a terminal
        assert running.wait(120) == 0
        assert "Traceback" not in (tmp_path / "errors").read_text()
        assert time.monotonic() - began < 90  # seconds even on a busy machine
        assert not any(map(is_running, parts))
    finally:
        running.kill()


def test_the_help_of_the_demo_has_the_options_of_the_worker():
    text = demo.build_parser().format_help()
    for flag in ("--port", "--device", "--dtype", "--pruning-method", "--trained-part"):
        assert f"  {flag}" in text
    assert text.count("--model-path MODEL_PATH") == 2  # in its usage and its list alone
    assert "--controller-address" not in text


def test_the_demo_refuses_words_that_the_worker_would_refuse_before_it_starts(monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", lambda *_: pytest.fail("it was started"))
    with pytest.raises(SystemExit):
        run_program(demo, monkeypatch, "--devise", "cpu")
    assert "(did you mean '--device'?)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="'fastvv' .did you mean 'fastv'"):
        run_program(demo, monkeypatch, "--pruning-method", "fastvv")
    with pytest.raises(SystemExit, match="--no-register: the page would never hear"):
        run_program(demo, monkeypatch, "--no-register")


def test_the_demo_says_what_is_missing_before_it_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "run", lambda *_: pytest.fail("it was started"))
    monkeypatch.setattr("llava.playground.ROOT", tmp_path)
    with pytest.raises(SystemExit, match="the playground is not here .* --model-path"):
        run_program(demo, monkeypatch)
    monkeypatch.setattr(demo, "PACKAGES", ("gradio", "no_such_package"))
    with pytest.raises(SystemExit, match="needs no_such_package of the extra `serve`"):
        run_program(demo, monkeypatch, "--model-path", str(tmp_path))
