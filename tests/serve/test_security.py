"""Attacks on the service, one test for each line of docs/Security.md that is about it."""

from __future__ import annotations

import asyncio
import base64
import hmac
import io
import json
import logging
import socket
import struct
import threading
import zlib

import httpx
import pytest
from PIL import Image

from llava.network import is_loopback
from llava.serve import addresses, auth, controller, demo, model_worker, sglang_worker
from llava.serve.addresses import WorkerAddresses
from llava.serve.controller import controller_app
from llava.serve.errors import ServeError
from llava.serve.images import decode_images
from llava.serve.limits import Limits
from llava.serve.worker_app import Places, worker_app
from tests.serve.serve_tools import (
    PATIENCE,
    Words,
    body,
    call,
    chunks_of,
    live,
    live_controller,
    make_controller,
    patient_get,
    patient_post,
    png,
    wait_for,
    words_app,
)

TOKEN = "0123456789abcdef-the-secret"
STREAM = "/worker_generate_stream"
CONTROLLER_PATHS = (
    "/register_worker",
    "/refresh_all_workers",
    "/list_models",
    "/get_worker_address",
    "/receive_heart_beat",
    "/report_worker",
    "/worker_generate_stream",
    "/worker_get_status",
)
STATUS = {"model_names": ["echo"], "speed": 1, "queue_length": 0}


def register(name, status=STATUS) -> tuple[str, dict]:
    content = {"worker_name": name, "check_heart_beat": True, "worker_status": status}
    return "/register_worker", content


# --- Who may talk to the service


@pytest.mark.parametrize("program", [controller, model_worker, sglang_worker, demo])
def test_programs_listen_on_loopback_unless_told_otherwise(program):
    required = ["--sgl-endpoint", "http://x"] if program is sglang_worker else []
    assert is_loopback(program.build_parser().parse_args(required).host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_a_network_address_without_a_token_is_refused(host, monkeypatch):
    monkeypatch.delenv(auth.TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr("sys.argv", ["controller", "--host", host])
    with pytest.raises(SystemExit, match="give it a token"):
        controller.main()
    auth.check_exposure(host, TOKEN)
    auth.check_exposure("localhost", None)


def test_a_short_token_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(auth.TOKEN_VARIABLE, "password")
    with pytest.raises(ValueError, match="at least 16"):
        auth.read_token()
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert auth.read_token(str(tmp_path / "token")) == TOKEN


@pytest.mark.parametrize("path", CONTROLLER_PATHS)
@pytest.mark.parametrize(
    "header", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}]
)
def test_no_endpoint_of_the_controller_answers_without_the_token(path, header):
    app = controller_app(make_controller(token=TOKEN), TOKEN)
    (reply,) = call(app, (path, {"model": "echo", "worker_name": "http://127.0.0.1:1"}), **header)
    assert reply.status_code == 401
    (allowed,) = call(app, ("/list_models", None), **auth.token_headers(TOKEN))
    assert allowed.status_code == 200


@pytest.mark.parametrize("path", [STREAM, "/worker_get_status"])
def test_no_endpoint_of_the_worker_answers_without_the_token(path):
    backend = Words()
    app = worker_app(backend, Places(3), TOKEN)
    (reply,) = call(app, (path, body()))
    assert reply.status_code == 401 and backend.closed == 0
    (reply,) = call(app, (path, body()), **auth.token_headers(TOKEN))
    assert reply.status_code == 200


def test_tokens_are_compared_in_constant_time(monkeypatch):
    compared = []

    def compare(ours, theirs):
        compared.append((ours, theirs))
        return False

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert not auth.is_authorized("Bearer x", TOKEN)
    assert compared == [(b"Bearer x", f"Bearer {TOKEN}".encode())]


def test_controller_worker_and_client_work_together_with_a_token():
    with live(words_app(token=TOKEN)) as worker, live_controller(token=TOKEN) as (address, _):
        headers = auth.token_headers(TOKEN)
        path, content = register(worker, None)
        patient_post(address + path, json=content, headers=headers)
        reply = patient_post(address + STREAM, json=body(model="echo"), headers=headers)
        assert chunks_of(reply.content)[-1]["text"].endswith("three")


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:7860", "null"])
def test_requests_of_web_pages_are_refused(origin):
    (reply,) = call(controller_app(make_controller()), ("/list_models", None), Origin=origin)
    assert reply.status_code == 403
    assert "access-control-allow-origin" not in reply.headers


def test_nothing_but_post_and_no_documentation_is_served():
    with live(words_app()) as worker:
        for path in ("/docs", "/redoc", "/openapi.json", "/", "/../../etc/passwd", "/%2e%2e/x"):
            reply = patient_get(worker + path)
            assert reply.status_code == 404 and reply.json()["cause"] == "unknown_endpoint"
            assert reply.json()["request_id"]
        (chunk,) = chunks_of(patient_get(worker + STREAM).content)
        assert chunk["cause"] == "wrong_method"


# --- Where the controller can be made to send requests


EVIL = [
    "http://169.254.169.254/latest/meta-data",
    "http://169.254.169.254",
    "http://evil.example:80",
    "http://127.0.0.1:1@evil.example",
    "http://localhost.evil.example:1",
    "http://127.0.0.1:1/worker_get_status?x=",
    "http://127.0.0.1:1/#",
    "http://127.0.0.1:99999",
    "http://0.0.0.0:1",
    "http://[::ffff:169.254.169.254]:80",
    "http://2852039166:80",
    "file:///etc/passwd",
    "gopher://127.0.0.1:70",
    "//127.0.0.1:1",
    "127.0.0.1:1",
    "http://",
    "http://127.0.0.1:1\r\nX-Injected: 1",
    "http://w\u0131:1",
    "http://127.0.0.1:1 ",
    "http://[::1",
    "x" * 5000,
]


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("status", [None, STATUS], ids=["asked", "told"])
def test_a_worker_address_that_is_not_allowed_is_refused_and_not_asked(name, status, monkeypatch):
    asked = []
    transport = httpx.MockTransport(lambda request: asked.append(request) or httpx.Response(500))
    checked = make_controller(allowed=["w1:1"], transport=transport)
    (reply,) = call(controller_app(checked), register(name, status))
    assert 400 <= reply.status_code < 500
    assert not asked and not checked.table.workers


@pytest.mark.parametrize("entry", ["w1", "w1:8000"])
def test_named_workers_are_allowed(entry):
    assert WorkerAddresses([entry]).check("http://w1:8000/") == "http://w1:8000"
    with pytest.raises(ServeError, match="not allowed"):
        WorkerAddresses(["w1:8001"]).check("http://w1:8000")


@pytest.mark.parametrize("caller, status", [("10.0.0.9", 403), ("127.0.0.1", 200), ("::1", 200)])
def test_only_programs_on_this_machine_may_name_its_loopback(caller, status):
    checked = make_controller()
    path, content = register("http://127.0.0.1:6379")

    async def run():
        transport = httpx.ASGITransport(controller_app(checked), client=(caller, 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return (await client.post(path, json=content)).status_code

    assert asyncio.run(run()) == status
    assert len(checked.table.workers) == (status == 200)


@pytest.mark.parametrize("entry", ["http://w1", "a@b", "w1:port", "w1/x", ""])
def test_a_wrong_entry_of_the_allow_list_is_named(entry):
    with pytest.raises(ValueError, match="--allow-worker"):
        WorkerAddresses([entry])


@pytest.mark.parametrize(
    "number", ["169.254.169.254", "::ffff:169.254.169.254", "fe80::1", "0.0.0.0"]
)
def test_an_allowed_name_that_leads_to_a_metadata_service_is_not_asked(number, monkeypatch):
    async def run():
        loop = asyncio.get_running_loop()

        async def look_up(*_, **__):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, 80))]

        monkeypatch.setattr(loop, "getaddrinfo", look_up)
        return await addresses.resolve("w1", 80)

    with pytest.raises(ServeError, match="not allowed"):
        asyncio.run(run())


def test_requests_go_to_the_number_that_was_checked_under_the_name_that_was_given(monkeypatch):
    seen = {}

    async def app(scope, receive, send):
        if scope["type"] == "http":
            seen.update(scope["headers"])
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": json.dumps(STATUS).encode()})

    lookups = []

    async def resolve(host, port):
        lookups.append(host)
        return ["127.0.0.1"]

    monkeypatch.setattr(addresses, "resolve", resolve)
    with live(app) as worker, live_controller(allowed=["worker.invalid"]) as (address, checked):
        port = worker.rsplit(":", 1)[1]
        path, content = register(f"http://worker.invalid:{port}", None)
        patient_post(address + path, json=content)
        assert lookups == ["worker.invalid"] and len(checked.table.workers) == 1
        assert seen[b"host"] == f"worker.invalid:{port}".encode()


def test_redirects_of_a_worker_are_not_followed():
    visited = []

    async def target(scope, receive, send):
        if scope["type"] == "http":
            visited.append(scope["path"])

    with live(target) as secret:

        async def redirecting(scope, receive, send):
            if scope["type"] == "http":
                headers = [(b"location", f"{secret}/steal".encode())]
                await send({"type": "http.response.start", "status": 307, "headers": headers})
                await send({"type": "http.response.body", "body": b""})

        with live(redirecting) as worker, live_controller() as (address, checked):
            patient_post(address + "/register_worker", json=register(worker, None)[1])
            assert not checked.table.workers
            patient_post(address + "/register_worker", json=register(worker)[1])
            reply = patient_post(address + STREAM, json=body(model="echo"))
            assert reply.status_code == 502 and reply.headers.get("location") is None
    assert visited == []


def test_a_worker_cannot_flood_the_controller_with_its_status():
    async def app(scope, receive, send):
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(64):
                await send({"type": "http.response.body", "body": b" " * 2**16, "more_body": True})

    with live(app) as worker, live_controller() as (address, checked):
        patient_post(address + "/register_worker", json=register(worker, None)[1])
        assert not checked.table.workers


def test_the_table_of_workers_is_bounded(monkeypatch):
    monkeypatch.setattr("llava.serve.dispatch.WORKERS", 3)
    app = controller_app(make_controller())
    replies = call(app, *(register(f"http://127.0.0.1:{port}") for port in range(1, 6)))
    assert [reply.status_code for reply in replies] == [200, 200, 200, 503, 503]


@pytest.mark.parametrize(
    "status",
    [
        {**STATUS, "speed": -1},
        {**STATUS, "speed": "1"},
        {**STATUS, "speed": 1e300},
        {**STATUS, "queue_length": -1},
        {**STATUS, "queue_length": 10**30},
        {**STATUS, "model_names": "echo"},
        {**STATUS, "model_names": ["x" * 1000]},
        {**STATUS, "model_names": [f"{n}" for n in range(1000)]},
        {},
    ],
)
def test_a_hostile_status_is_refused(status):
    (reply,) = call(controller_app(make_controller()), register("http://127.0.0.1:1", status))
    assert reply.status_code in (400, 413)


# --- What a request can contain


def test_an_image_is_never_fetched(monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("a request was made")

    for name in ("create_connection", "getaddrinfo", "socket"):
        monkeypatch.setattr(socket, name, no_network)
    for text in ("http://127.0.0.1/x.png", "file:///etc/passwd", "/etc/passwd", "../x.png"):
        with pytest.raises(ServeError) as refused:
            decode_images([text])
        assert refused.value.cause == "bad_image" and text not in refused.value.message


def bomb(width: int, height: int) -> str:
    """A small PNG file that says it is huge."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    parts = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    )
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + parts).decode()


@pytest.mark.parametrize(
    "images, cause",
    [
        ([bomb(50_000, 50_000)], "too_large"),
        ([bomb(6_000, 6_000)], "too_large"),
        ([bomb(2, 2**31 - 1)], "too_large"),
        ([png(4000, 2)], "too_large"),
        ([bomb(9000, 1000)], "too_large"),
        ([bomb(100, 100)], "bad_image"),
        ([png()[:60]], "bad_image"),
        (["!!!!"], "bad_image"),
        ([""], "bad_image"),
        ([png(format="TIFF")], "bad_image"),
        ([png(format="PPM")], "bad_image"),
        ([base64.b64encode(b"%!PS-Adobe EPSF\n%%BoundingBox: 0 0 9 9\n").decode()], "bad_image"),
    ],
    ids=range(12),
)
def test_a_hostile_image_is_refused_before_it_is_decoded(images, cause):
    with pytest.raises(ServeError) as refused:
        decode_images(images)
    assert refused.value.cause == cause


def test_the_pixels_of_all_images_are_counted_together():
    limits = Limits(image_pixels=1000)
    assert len(decode_images([png(20, 20), png(20, 30)], limits)) == 2
    with pytest.raises(ServeError, match="more than 1,000 pixels"):
        decode_images([png(20, 20), png(20, 31)], limits)


def test_every_accepted_format_is_read():
    images = [png(format=kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")]
    assert [image.mode for image in decode_images(images)] == ["RGB"] * 5
    wide = io.BytesIO()
    Image.new("I;16", (8, 8), 65535).save(wide, "PNG")
    (image,) = decode_images([base64.b64encode(wide.getvalue()).decode()])
    assert image.getpixel((0, 0)) == (255, 255, 255)


WRONG_VALUES = {
    "temperature": [-0.1, 1e9, "0.2", None, [], True],
    "top_p": [-1, 1.01, "x"],
    "max_new_tokens": [-1, 10**20, 1.5, "8", None],
    "stop": ["x" * 1000, 5, ["a"]],
    "prompt": ["", None, 5, "x" * 70_000],
    "images": ["text", [5], [None], {}, [png(2, 2)] * 9],
    "model": [5, "", "x" * 1000],
    "pruning": [
        "vispruner",
        {},
        {"method": "../x"},
        {"method": "none", "visual_token_num": 0},
        {"method": "none", "visual_token_num": 1.5},
        {"method": "none", "options": []},
        {"method": "none", "options": {"a": {}}},
        {"method": "none", "options": {"__class__.x": 1}},
        {"method": "none", "options": {"a": "x" * 1000}},
        {"method": "none", "options": {"a": 10**400}},
        {"method": "none", "other": 1},
    ],
}


@pytest.mark.parametrize("value", [1e300, 10**30, {"a": 1}, "x" * 1000, [10**30]])
def test_an_option_out_of_bounds_is_told_what_options_may_be(value):
    pruning = {"method": "none", "options": {"a": value}}
    (reply,) = call(words_app(Words()), (STREAM, body(pruning=pruning)))
    (chunk,) = chunks_of(reply.content)
    assert chunk["text"].startswith("pruning.options.a: Input should be a number up to 1000000")


@pytest.mark.parametrize("key", WRONG_VALUES)
def test_values_out_of_bounds_are_refused_without_being_repeated(key):
    backend = Words()
    replies = call(words_app(backend), *((STREAM, body(**{key: v})) for v in WRONG_VALUES[key]))
    for reply, value in zip(replies, WRONG_VALUES[key], strict=True):
        (chunk,) = chunks_of(reply.content)
        assert reply.status_code in (400, 413) and chunk["text"].startswith(key), value
        assert len(chunk["text"]) < 300
    assert backend.closed == 0


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(text):
    content = json.dumps(body()).replace('"temperature": 0', f'"temperature": {text}')
    with live(words_app()) as worker:
        headers = {"Content-Type": "application/json"}
        assert patient_post(worker + STREAM, content=content, headers=headers).status_code == 400


# --- What is said and stored


def test_nothing_of_a_request_is_stored_or_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    secret = "swordfish"
    content = [body(prompt=f"{secret} <image>", images=[png()]), body(prompt=secret, top_p=secret)]
    replies = call(words_app(), *((STREAM, one) for one in content))
    assert [reply.status_code for reply in replies] == [200, 400]
    assert list(tmp_path.iterdir()) == []
    assert secret not in caplog.text


def test_log_lines_cannot_be_forged(caplog):
    caplog.set_level(logging.INFO)
    forged = "x\n2026-01-01 | INFO | registered http://evil"
    app = controller_app(make_controller())
    call(
        app,
        register("http://127.0.0.1:1", {**STATUS, "model_names": [forged]}),
        ("/get_worker_address", {"model": forged}),
    )
    assert "\n2026-01-01" not in caplog.text
    (reply,) = call(words_app(), (STREAM, body()), **{"X-Request-Id": "a b"})
    assert reply.status_code == 200


class Failing(Words):
    async def prepare(self, request, request_id):
        raise RuntimeError("no such file: /secret/place at http://10.0.0.1:99")


def test_errors_name_a_cause_and_a_request_and_nothing_of_the_server(caplog):
    (reply,) = call(words_app(Failing()), (STREAM, body()))
    (chunk,) = chunks_of(reply.content)
    assert reply.status_code == 500 and set(chunk) == {"text", "error_code", "cause", "request_id"}
    assert chunk["cause"] == "internal" and "secret" not in reply.text and "10.0" not in reply.text
    assert f"request {chunk['request_id']}: RuntimeError" in caplog.text
    assert "Traceback" not in reply.text and "server" not in reply.headers


def test_one_client_cannot_take_more_than_the_queue():
    backend, codes = Words(gate=threading.Event()), []
    with live(words_app(backend, places=2)) as worker:

        async def post(client):
            codes.append((await client.post(worker + STREAM, json=body())).status_code)
            if codes.count(503) == 8:
                backend.gate.set()

        async def run():
            async with httpx.AsyncClient(timeout=PATIENCE) as client:
                await asyncio.gather(*(post(client) for _ in range(10)))

        asyncio.run(run())
        codes.sort()
        assert codes == [200] * 2 + [503] * 8
        wait_for(lambda: backend.running == 0)
        assert patient_post(worker + STREAM, json=body()).status_code == 200
