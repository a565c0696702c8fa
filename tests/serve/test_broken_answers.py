"""What the small programs say where a worker or controller breaks off, or is none."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager

import pytest

from llava.pruning import METHODS, build_pruner
from llava.serve import register_worker, test_message, throughput
from llava.serve.methods import unavailable
from tests.ports import free_port
from tests.serve.serve_tools import body, live

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b'{"text": "abc", "error_code": 0}\0'


def piece(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@contextmanager
def answering(data: bytes):
    """The address of a server that answers one request with these bytes, whatever it is."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                received = b""
                while b"}" not in received:
                    received += connection.recv(65536)
                connection.sendall(data)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join(10)


def saying(reply: bytes):
    """An app that is none of this package and answers everything so."""

    async def app(scope, receive, send):
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": reply})

    return app


@pytest.mark.parametrize("reply", [b"[1]", b"{}", b"null", b"hello", b'{"models": 5}', b"[" * 9999])
@pytest.mark.parametrize(
    "ask",
    [
        lambda address: test_message.find_worker(asked(test_message, address), None),
        lambda address: test_message.template_at(address, None),
        lambda address: throughput.requests_for(address, [], asked(throughput, address), None),
    ],
    ids=["controller", "worker", "worker of throughput"],
)
def test_what_is_no_service_of_ours_is_told_so(ask, reply):
    with live(saying(reply)) as address:
        with pytest.raises(ValueError, match="is that a controller or worker of llava.serve") as e:
            ask(address)
    assert address in str(e.value)


def asked(program, address: str):
    """Options of a program that asks this address."""
    option = "--worker-address" if program is throughput else "--controller-address"
    return program.build_parser().parse_args([f"{option}={address}"])


@pytest.mark.parametrize("read", [test_message.show_answer, throughput.ask])
@pytest.mark.parametrize(
    "data, message",
    [
        (HEAD + piece(CHUNK), "or not all of it"),
        (HEAD + piece(b"[1]") + piece(b""), "is no answer of a worker"),
        (HEAD + piece(b"hello") + piece(b""), "is no answer of a worker"),
        (HEAD + piece(CHUNK + b'{"text": "busy", "error_code": 1}\0') + piece(b""), "busy"),
    ],
    ids=["breaks off", "a list", "no JSON", "an error"],
)
def test_an_answer_that_is_none_ends_in_a_sentence(read, data, message):
    with answering(data) as address, pytest.raises(ValueError, match=message) as failed:
        read(address, body(), None)
    assert address in str(failed.value)


def test_a_worker_is_registered_where_a_controller_is(monkeypatch):
    nobody = f"http://127.0.0.1:{free_port()}"
    flags = ["--controller-address", nobody, "--worker-name", "http://localhost:1"]
    monkeypatch.setattr("sys.argv", ["register_worker", *flags])
    with pytest.raises(SystemExit, match=f"^error: no controller at {nobody}: start"):
        register_worker.main()


def test_the_names_of_methods_in_a_refusal_are_all_or_say_that_more_follow():
    with pytest.raises(ValueError) as failed:
        build_pruner("other")
    message = unavailable(failed.value).message
    assert all(name in message for name in METHODS)
    assert unavailable(ValueError("word " * 999)).message.endswith(" ...")
