"""Strangers who hold connections, send without an end, or do not read: others are answered."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest
from starlette.responses import StreamingResponse

from llava.serve.connections import BODY_PIECE, CONNECTIONS, WAITING, ImpatientProtocol, Lobby
from llava.serve.limits import Limits
from llava.serve.service import Request, build_app, read_bytes
from tests.serve.serve_tools import (
    PATIENCE,
    Words,
    body,
    chunks_of,
    live,
    patient_post,
    wait_for,
    words_app,
)

TOKEN = "0123456789abcdef-the-secret"
STREAM = "/worker_generate_stream"
STATUS = "/worker_get_status"


@contextmanager
def connected(address: str, seconds: float = 60):
    """A connection to the server at `address`."""
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as one:
        yield one


class Hasty(ImpatientProtocol):
    """Waits long for the head of a request, and for nothing else."""

    head_seconds, linger_seconds, stall_seconds = 600.0, 0.3, 0.3


class HastyAtFirst(ImpatientProtocol):
    head_seconds = 0.3


# --- Bodies


def test_a_body_is_refused_once_it_is_too_large():
    limits = Limits(body_bytes=2**20)
    app = build_app(None, limits=limits)

    @app.post(STREAM)
    async def endpoint(request: Request):
        await read_bytes(request, limits)

    sent = 0

    def pieces():
        nonlocal sent
        for _ in range(64):
            sent += 2**20
            yield b" " * 2**20

    headers = {"Content-Type": "application/json"}
    with live(app) as worker:
        announced = patient_post(worker + STREAM, content=b" " * (2**20 + 1), headers=headers)
        assert announced.status_code == 413
        try:
            assert (
                patient_post(worker + STREAM, content=pieces(), headers=headers).status_code == 413
            )
        except (httpx.NetworkError, httpx.RemoteProtocolError):
            pass  # the server hung up before all was sent
        assert chunks_of(announced.content)[0]["cause"] == "too_large"


def test_a_body_that_never_ends_is_given_up():
    limits = Limits(body_seconds=0.3)
    app = build_app(None, limits=limits)

    @app.post("/slow")
    async def endpoint(request: Request):
        await read_bytes(request, limits)

    with live(app) as worker:
        with connected(worker) as one:
            one.sendall(
                b"POST /slow HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            assert b" 408 " in one.recv(1000).split(b"\r\n")[0]


class WithoutPatienceForBodies(ImpatientProtocol):
    body_seconds = 0.5


def begun(one, length: int) -> None:
    """Sends a request without its body."""
    head = f"POST {STREAM} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    one.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())


@pytest.mark.parametrize("sent", [0, 1, 200_000], ids=lambda sent: f"after {sent} bytes")
def test_a_body_that_pauses_is_given_up_long_before_its_time_is_over(sent, caplog):
    caplog.set_level("INFO")
    with live(words_app(), http=WithoutPatienceForBodies) as worker, connected(worker) as one:
        began = time.monotonic()
        begun(one, 300_000)
        one.sendall(b" " * sent)
        assert one.recv(100) == b"", "closed"
        assert time.monotonic() - began < Limits().body_seconds / 2
        wait_for(lambda: "refused, too_slow" in caplog.text)
    assert "ERROR" not in caplog.text, "a client that leaves is no failure of ours"


class Patient(ImpatientProtocol):
    body_seconds = 1.5


def test_a_body_that_comes_slowly_but_steadily_is_read():
    content = json.dumps(body()).encode().ljust(200)
    with live(words_app(), http=Patient) as worker, connected(worker) as one:
        begun(one, len(content))
        for start in range(0, len(content), 10):  # longer than a body may pause
            one.sendall(content[start : start + 10])
            time.sleep(0.1)
        assert one.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("piece, stays", [(1, False), (BODY_PIECE, True)])
def test_the_slowest_body_gives_way_to_others(piece, stays):
    class Small(ImpatientProtocol):
        places = 4

    with live(words_app(), http=Small) as worker, ExitStack() as several:
        mine = several.enter_context(connected(worker))
        begun(mine, 10**6)
        others = []
        for _ in range(5):
            with suppress(ConnectionError):  # once it was closed
                mine.sendall(b" " * piece)
            time.sleep(0.2)
            others.append(several.enter_context(connected(worker)))
            begun(others[-1], 10**6)
        first = others[0] if stays else mine
        with suppress(ConnectionResetError):  # what was sent behind the end
            assert first.recv(100) == b"", "closed"
        last = mine if stays else others[-1]
        last.settimeout(0.3)
        with pytest.raises(TimeoutError):
            last.recv(100)


def test_a_server_that_reads_slowly_cuts_nobody_off():
    read = []

    async def app(scope, receive, send):
        if scope["type"] == "http":
            await asyncio.sleep(2.5)  # longer than a body may pause
            more = True
            while more:
                message = await receive()
                read.append(len(message.get("body", b"")))
                more = message.get("more_body")
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    with live(app, http=Patient) as server:
        reply = patient_post(server, content=bytes(10**7))
    assert reply.status_code == 200 and sum(read) == 10**7


@pytest.mark.parametrize("sent", [b"", b"POST /", b"POST / HTTP/1.1\r\nHost: x\r\n"])
def test_connections_that_send_no_request_are_closed(sent):
    with live(words_app(), http=HastyAtFirst) as worker, connected(worker) as one:
        one.sendall(sent)
        assert one.recv(100) == b"", "closed"


def test_others_keep_theirs_however_long_they_wait_in_between_or_for_an_answer():
    class Hasty(ImpatientProtocol):
        head_seconds = 600.0

    ports = set()
    with live(words_app(Words(pause=0.2)), http=Hasty) as worker:
        with httpx.Client(timeout=PATIENCE) as client:
            for _ in range(3):
                reply = client.post(worker + STREAM, json=body())
                assert reply.status_code == 200 and b"three" in reply.content
                ports.add(reply.extensions["network_stream"].get_extra_info("client_addr"))
                Hasty.head_seconds = 0.3  # only now: the first request might come too late
                time.sleep(0.5)
    assert len(ports) == 1


def test_a_form_with_an_endless_file_name_is_refused_at_its_first_line():
    form = b'--x\r\nContent-Disposition: form-data; name="f"; filename="' + b"-" * 2**20
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with live(words_app()) as worker:
        reply = patient_post(worker + STREAM, content=form, headers=headers)
        assert reply.status_code == 415
        long_header = {"X-Long": "a" * 2**20}
        with pytest.raises((httpx.HTTPStatusError, httpx.HTTPError)):
            patient_post(worker + STREAM, json=body(), headers=long_header).raise_for_status()
        assert patient_post(worker + STREAM, json=body()).status_code == 200


def test_other_bodies_than_json_are_refused():
    with live(words_app()) as worker:
        content = json.dumps(body()).encode()
        for headers in (
            {"Content-Type": "text/plain"},
            {"Content-Type": "application/x-www-form-urlencoded"},
            {"Content-Type": "application/json", "Content-Encoding": "gzip"},
            {},
        ):
            reply = patient_post(worker + STREAM, content=content, headers=headers)
            assert reply.status_code == 415


# --- Heads


LINES = b"".join(b"x-%d: y\r\n" % number for number in range(50_000))


@pytest.mark.parametrize("head", [LINES, LINES[:20_000], b"X-Long: " + b"a" * 10**6])
@pytest.mark.parametrize("piece", [2**20, 4000])
def test_a_head_of_many_or_long_lines_is_refused(head, piece):
    data = b"POST /worker_get_status HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n"
    with live(words_app()) as worker:
        with connected(worker) as one:
            try:
                for start in range(0, len(data), piece):
                    one.sendall(data[start : start + piece])
                assert b" 400 " in one.recv(1000).split(b"\r\n")[0]
            except ConnectionError:
                pass  # the server hung up before all was sent
        assert patient_post(worker + STATUS).status_code == 200


def test_a_web_socket_is_a_request_like_any_other(caplog):
    head = "Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    with live(words_app()) as worker, connected(worker) as one:
        one.sendall(f"GET {STREAM} HTTP/1.1\r\n{head}Sec-WebSocket-Key: eA==\r\n\r\n".encode())
        assert b" 405 " in one.recv(1000).split(b"\r\n")[0]
    assert "websocket" not in caplog.text.lower()


@pytest.mark.parametrize("path", ["/worker_get_status/", "//evil.example/x/", "/%2e%2e/etc/"])
def test_nothing_redirects(path):
    with live(words_app()) as worker:
        reply = patient_post(worker + path, headers={"Host": "evil.example"})
        assert reply.status_code == 404 and "location" not in reply.headers


# --- Many connections


def test_of_those_that_wait_the_longest_wait_ends_first():
    class Waiting:
        gone = False

        def hang_up(self):
            self.gone = True

    lobby, several = Lobby(places=2), [Waiting() for _ in range(4)]
    for one in several[:2]:
        lobby.enter(one)
    lobby.enter(several[0])  # says it again: no later place
    lobby.enter(several[2])
    lobby.leave(several[1])
    lobby.enter(several[3])
    assert [one.gone for one in several] == [True, False, False, False]


def test_who_had_an_answer_gives_way_to_who_had_none():
    class Waiting:
        gone = False

        def hang_up(self):
            self.gone = True

    lobby, several = Lobby(places=2), [Waiting() for _ in range(4)]
    lobby.enter(several[0])
    for one in several[1:]:
        lobby.enter(one, answered=True)
    assert [one.gone for one in several] == [False, True, True, False]


def test_a_burst_of_refused_requests_does_not_cut_off_one_that_just_arrived():
    held = b"POST /worker_get_status HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{"
    friend = held.replace(b"Host: x", f"Host: x\r\nAuthorization: Bearer {TOKEN}".encode())
    friend = friend.replace(b"50\r\n\r\n{", b"0\r\n\r\n")
    with live(words_app(token=TOKEN), http=Hasty) as worker, ExitStack() as several:
        mine = several.enter_context(connected(worker))
        for _ in range(WAITING + 20):  # all behind `mine`, which waits longest
            other = several.enter_context(connected(worker))
            other.sendall(held)
            assert other.recv(100).startswith(b"HTTP/1.1 401")
        mine.sendall(friend)
        assert mine.recv(100).startswith(b"HTTP/1.1 200")


#: what a stranger without the token sends, and then keeps the connection
HELD = {
    "nothing": b"",
    "half of a head": b"POST / HTTP/1.1\r\nHost: x\r\nX-",
    "a refused request": b"POST /worker_get_status HTTP/1.1\r\nHost: x\r\n\r\n",
    "a request whose body never comes": b"POST /worker_generate_stream HTTP/1.1\r\nHost: x\r\n"
    b"Authorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
    % TOKEN.encode(),
    "a refused request whose body never ends": b"POST /worker_get_status HTTP/1.1\r\nHost: x\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
}


@pytest.mark.parametrize("sent", HELD.values(), ids=HELD)
def test_held_connections_of_strangers_keep_nobody_out(sent):
    """More of them than the server has room for, and more than this process has by default."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with live(words_app(token=TOKEN)) as worker, ExitStack() as held:
        for number in range(CONNECTIONS + 20):
            held.enter_context(connected(worker)).sendall(sent)
            if number > WAITING and number % 50 == 0:
                reply = httpx.post(worker + STATUS, headers=headers, timeout=60)
                assert reply.status_code == 200
        for _ in range(10):  # friends keep their connections, too
            friend = held.enter_context(httpx.Client(headers=headers, timeout=60))
            reply = friend.post(worker + STREAM, json=body())
            assert reply.status_code == 200 and b"three" in reply.content


def test_a_refused_body_that_never_ends_is_not_read_for_ever():
    head = b"POST /worker_get_status HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with live(words_app(token=TOKEN), http=Hasty) as worker, connected(worker) as one:
        one.sendall(head)
        assert b" 401 " in one.recv(1000).split(b"\r\n")[0]
        end = time.monotonic() + 60
        with pytest.raises(ConnectionError):
            while time.monotonic() < end:
                one.sendall(b"1\r\na\r\n")
                time.sleep(0.05)


def test_a_head_that_comes_in_drops_is_given_up():
    with live(words_app(), http=HastyAtFirst) as worker, connected(worker) as one:
        end = time.monotonic() + 60
        with pytest.raises(ConnectionError):
            while time.monotonic() < end:
                one.sendall(b"P")
                time.sleep(0.05)


def test_an_answer_that_nobody_reads_is_given_up():
    ended = []

    async def endless():
        try:
            while True:
                yield bytes(2**20)
                await asyncio.sleep(0)
        finally:
            ended.append(True)

    async def app(scope, receive, send):
        if scope["type"] == "http":
            await StreamingResponse(endless())(scope, receive, send)

    with live(app, http=Hasty) as server, connected(server) as one:
        one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_for(lambda: ended, seconds=60)
