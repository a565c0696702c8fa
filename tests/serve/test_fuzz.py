"""Malformed requests, hundreds of them: each ends in a 4xx, and the service still answers."""

from __future__ import annotations

import json
import random
import socket

import httpx
import pytest

from llava.pruning import METHODS
from llava.serve.engine import Engine
from llava.serve.methods import defaults, file_options, place
from llava.serve.worker_app import Places, worker_app
from tests.golden_cases import SHIPPED
from tests.golden_checks.models import load_checkpoint
from tests.serve.serve_tools import (
    body,
    chunks_of,
    live,
    live_controller,
    patient_post,
    png,
    wait_for,
)
from tests.serve.test_security import bomb

NAME = "tiny-llava-v1.5"
STREAM = "/worker_generate_stream"
JSON = {"Content-Type": "application/json"}
HUGE = 10**400
PATHS = ("/etc/passwd", "../../../etc/passwd", "C:\\x", "file:///etc/passwd", "http://127.0.0.1/")
UNICODE = ("\u202e", "\ufeff", "\U0001f600" * 50, "\x00", "\x1b[31m", "e\u0301" * 20, "\ud7ff")
LEARNED = [name for name in METHODS if file_options(name)]
JUNK = (None, True, -1, 1.5, HUGE, "", "x", [], {}, [[]], [None], {"a": 1}, *PATHS, *UNICODE)


def wrong_types(chance: random.Random):
    """A good request in which one value is replaced by something it cannot be."""
    allowed = {
        "prompt": lambda v: isinstance(v, str) and v,
        "temperature": lambda v: (
            isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v <= 5
        ),
        "top_p": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and 0 <= v <= 1,
        "max_new_tokens": lambda v: (
            isinstance(v, int) and not isinstance(v, bool) and 0 <= v < HUGE
        ),
        "stop": lambda v: v is None or isinstance(v, str),
        "images": lambda v: v is None or v == [],
        "pruning": lambda v: v is None,
        "model": lambda v: v is None,
        "question": lambda v: v is None or isinstance(v, str),
    }
    key = chance.choice(list(allowed))
    junk = chance.choice([value for value in JUNK if not allowed[key](value)])
    return json.dumps(body(**{key: junk})).encode()


def hostile_images(chance: random.Random):
    """A request whose image is none, broken, or a bomb."""
    whole = png(30, 30)
    cut = whole[: 4 * chance.randrange(1, len(whole) // 8)]
    flipped = bytearray(whole.encode())
    for _ in range(8):
        flipped[chance.randrange(4, 40)] = ord(chance.choice("ABCDabcd"))
    image = chance.choice(
        [
            cut,
            flipped.decode(),
            bomb(40_000, 40_000),
            bomb(1, 9_000),
            *PATHS,
            *UNICODE,
            "A" * 10_000,
        ]
    )
    return json.dumps(body(images=[image], prompt="<image> x")).encode()


def wrong_counts(chance: random.Random):
    """Images and marks that do not match."""
    marks, images = chance.choice([(0, 1), (1, 0), (2, 1), (1, 2), (50, 1), (3, 8), (1, 9)])
    prompt = "x" + "<image>" * marks
    return json.dumps(body(prompt=prompt, images=[png(2, 2)] * images)).encode()


def hostile_pruning(chance: random.Random):
    """Methods and options that are none."""
    method = chance.choice(["fastv", "vispruner", "none", "random+fastv", "twigvlm", "+", "a+b+c"])
    value = chance.choice([*PATHS, -5, 10**9, 1e308, [1] * 99, "x" * 99, {"a": 1}, [[1]], HUGE])
    options = {chance.choice(["layer", "seed", "x", "visual_token_num", "__init__", "a b"]): value}
    pruning = {
        "method": method,
        "options": options,
        "visual_token_num": chance.choice([0, -1, HUGE]),
    }
    return json.dumps(body(pruning=pruning)).encode()


def no_json(chance: random.Random):
    """Bytes that are no JSON object."""
    good = json.dumps(body()).encode()
    return chance.choice(
        [
            good[: chance.randrange(1, len(good))],
            good + b"}",
            b"",
            b"[" * 50_000,
            b'{"prompt":' * 5_000,
            b"\xff\xfe\x00",
            bytes(chance.randrange(128, 256) for _ in range(50)),
            b'{"prompt": "\\ud800"}',
            b'{"prompt": "a", "temperature": NaN}',
            b'{"prompt": "a", "max_new_tokens": 1e400}',
            b'"text"',
            b"null",
            b"5",
            b"[]",
        ]
    )


KINDS = (wrong_types, hostile_images, wrong_counts, hostile_pruning, no_json)


@pytest.fixture(scope="module")
def worker():
    tokenizer, model, processor = load_checkpoint(NAME, SHIPPED / "llava-base")
    engine = Engine(tokenizer, model, processor, NAME)
    with live(worker_app(engine, Places(8))) as address:
        yield address


@pytest.mark.parametrize("kind", KINDS)
def test_malformed_requests_end_in_4xx_and_the_next_one_is_answered(worker, kind):
    with httpx.Client(timeout=60) as client:
        for seed in range(40):
            content = kind(random.Random(f"{kind.__name__} {seed}"))
            reply = client.post(worker + STREAM, content=content, headers=JSON)
            assert 400 <= reply.status_code < 500, (seed, content[:300], reply.text[:300])
            (chunk,) = chunks_of(reply.content)
            assert chunk["error_code"] == 1 and len(chunk["text"]) < 500
            assert not any(path in chunk["text"] for path in PATHS[:2])
        good = client.post(worker + STREAM, json=body())
        assert chunks_of(good.content)[-1]["error_code"] == 0
        wait_for(lambda: client.post(f"{worker}/worker_get_status").json()["queue_length"] == 0)


ODD = (0, -1, 10**6, 0.0, -0.5, 1.5, 1e-9, True, None, "", [], [-1], [2, 1], [0.5, 1e9])


def odd_options(chance: random.Random) -> dict:
    """A method, or two in a row, with one option that is odd but may be a value."""
    names = [name for name in METHODS if defaults(name) and name not in LEARNED]
    places = {name: place(METHODS[name]()) for name in names}
    method, prefix, owner = chance.choice(names), "", None
    if places[method] == "first" and chance.random() < 0.5:
        second = chance.choice([name for name in names if places[name] == "second"])
        owner = chance.choice([method, second])
        method, prefix = f"{method}+{second}", f"{owner}_"
    option = chance.choice(list(defaults(owner or method)))
    return {"method": method, "options": {f"{prefix}{option}": chance.choice(ODD)}}


def test_odd_options_are_used_or_refused_and_never_break_the_worker(worker):
    image = png(30, 30)
    with httpx.Client(timeout=60) as client:
        for seed in range(60):
            pruning = odd_options(random.Random(seed))
            content = body(images=[image], pruning=pruning, max_new_tokens=1)
            reply = client.post(worker + STREAM, json=content)
            last = chunks_of(reply.content)[-1]
            assert last.get("cause") in (None, "bad_request", "method_unavailable"), pruning
            assert reply.status_code == (400 if last["error_code"] else 200), pruning


PIECES = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00",
    "an endless request line": b"POST /" + b"a" * 100_000,
    "a negative length": b"POST /worker_get_status HTTP/1.1\r\nHost: x\r\n"
    b"Content-Length: -5\r\n\r\n",
    "a length that is no number": b"POST /worker_get_status HTTP/1.1\r\nHost: x\r\n"
    b"Content-Length: 1e9\r\n\r\n",
    "a huge length": b"POST /worker_generate_stream HTTP/1.1\r\nHost: x\r\n"
    b"Content-Type: application/json\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "two lengths": b"POST /worker_get_status HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n"
    b"Content-Length: 2\r\n\r\nab",
    "no host": b"POST /worker_get_status HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("data", PIECES.values(), ids=PIECES.keys())
def test_broken_http_is_refused(worker, data):
    host, port = worker.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as one:
        one.sendall(data)
        one.shutdown(socket.SHUT_WR)
        assert b" 4" in one.recv(1000).split(b"\r\n")[0]
    assert patient_post(f"{worker}/worker_get_status").status_code == 200


BODIES = [
    *(
        {"worker_name": text, "check_heart_beat": True, "worker_status": None}
        for text in PATHS[:-1]
    ),
    *({"worker_name": text, "queue_length": 1} for text in UNICODE),
    *({"worker_name": junk} for junk in (None, 5, [], {}, "x" * 10_000)),
    *({"model": junk} for junk in (None, 5, [], {}, "", "x" * 10_000)),
    *([], "text", 5, None, {}),
]


@pytest.mark.parametrize(
    "path", ["/register_worker", "/receive_heart_beat", "/get_worker_address", "/report_worker"]
)
def test_malformed_requests_to_the_controller_end_in_4xx(path):
    with live_controller() as (address, controller), httpx.Client(timeout=20) as client:
        for content in BODIES:
            text = json.dumps(content).encode()
            reply = client.post(address + path, content=text, headers=JSON)
            assert 400 <= reply.status_code < 500, (content, reply.text)
        assert client.post(f"{address}/list_models").json() == {"models": []}
        assert not controller.table.workers
