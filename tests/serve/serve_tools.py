"""What the tests of the service share: servers in threads, workers without a model, requests."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from contextlib import contextmanager
from functools import partial

import httpx
import uvicorn
from PIL import Image

from llava.serve.addresses import WorkerAddresses, WorkerClient
from llava.serve.connections import uvicorn_options
from llava.serve.controller import Controller, controller_app
from llava.serve.dispatch import WorkerTable
from llava.serve.errors import encode_chunk
from llava.serve.worker_app import Places, worker_app
from tests.ports import free_port

PROMPT = "USER: <image>\nWhat is it? ASSISTANT:"
TEXT_PROMPT = "USER: What is it? ASSISTANT:"
STREAM = "/worker_generate_stream"
#: seconds until what comes at once counts as missing: a busy machine stands still at times
PATIENCE = 60.0
#: seconds until a program has loaded all it needs
START_SECONDS = 600.0
patient_post = partial(httpx.post, timeout=PATIENCE)  # httpx gives up after 5 s
patient_get = partial(httpx.get, timeout=PATIENCE)
patient_stream = partial(httpx.stream, timeout=PATIENCE)


def png(width: int = 40, height: int = 30, color="red", format: str = "PNG") -> str:
    """Base64 text of an image file."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, format)
    return base64.b64encode(file.getvalue()).decode()


def body(**changes) -> dict:
    """A good request without an image; `images=` brings the mark along."""
    prompt = PROMPT if changes.get("images") else TEXT_PROMPT
    basics = {"prompt": prompt, "temperature": 0, "max_new_tokens": 4, "stop": "</s>"}
    return {**basics, **changes}


def chunks_of(data: bytes) -> list[dict]:
    """The chunks of a whole stream."""
    *chunks, rest = data.split(b"\0")
    assert rest == b""
    return [json.loads(chunk) for chunk in chunks]


class Words:
    """A worker's backend that answers with the words it was given, one a chunk.

    pause: seconds before every word; `running` and `closed` count streams
    gate:  words after the first one wait until it is set
    """

    def __init__(self, words=("one", "two", "three"), pause=0.0, name="echo", gate=None):
        self.words, self.pause, self.model_name, self.gate = words, pause, name, gate
        self.running = self.closed = self.answered = 0

    def status(self) -> dict:
        return {}

    async def prepare(self, request, request_id):
        return request

    async def stream(self, job):
        self.running += 1
        text = job.prompt
        try:
            for word in self.words:
                await asyncio.sleep(self.pause)
                text += f" {word}"
                yield encode_chunk({"text": text, "error_code": 0})
                while self.gate is not None and not self.gate.is_set():
                    await asyncio.sleep(0.005)
            self.answered += 1
        finally:
            self.running -= 1
            self.closed += 1

    def close(self) -> None:
        pass


def words_app(backend=None, places: int = 8, **options):
    return worker_app(backend or Words(), Places(places), **options)


class PatientClient(WorkerClient):
    """Gives workers longer to say how they are than 2 to 5 s, which are few on a busy machine."""

    async def ask(self, address: str, path: str, seconds: float, most_bytes: int) -> bytes:
        return await super().ask(address, path, PATIENCE, most_bytes)


def make_controller(method="shortest_queue", allowed=(), token=None, transport=None):
    return Controller(
        WorkerTable(method), WorkerAddresses(allowed), PatientClient(token, transport=transport)
    )


def call(app, *requests, **headers) -> list[httpx.Response]:
    """The replies of an application to (path, JSON body) pairs, without a network."""

    async def run():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost", headers=headers
        ) as client:
            return [await client.post(path, json=content) for path, content in requests]

    return asyncio.run(run())


def ask(app, **changes) -> list[dict]:
    """The chunks of the answer of a worker."""
    (reply,) = call(app, (STREAM, body(**changes)))
    return chunks_of(reply.content)


def outcome(chunks: list[dict]) -> dict:
    """The last chunk without what differs from run to run."""
    last = chunks[-1]
    for key in ("prefill_seconds", "total_seconds"):
        assert last["pruning_report"].pop(key) > 0
    return last


@contextmanager
def live(app, port: int | None = None, **options):
    """The address of `app`, served on loopback by a thread of this process, as services are.

    options: other ones of uvicorn
    """
    port = port or free_port()
    options = {**uvicorn_options(1), "log_level": "error", **options}
    config = uvicorn.Config(app, host="127.0.0.1", port=port, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextmanager
def live_controller(**options):
    """(address, controller) of a running controller."""
    controller = make_controller(**options)
    with live(controller_app(controller, options.get("token"))) as address:
        yield address, controller


def ask_and_leave(address: str, begun, **changes) -> None:
    """Sends a request, and hangs up without having read anything as soon as `begun()` is true."""
    content = json.dumps(body(**changes)).encode()
    head = f"POST {STREAM} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as one:
        one.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_for(begun)


def wait_for(condition, seconds: float = PATIENCE):
    """Waits until `condition()` is true, and returns what it returned."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return result
