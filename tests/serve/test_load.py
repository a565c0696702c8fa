"""Many clients at once, workers that die and come back: nothing is lost, and errors are clear."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from llava import playground
from tests.paths import ROOT
from tests.serve.serve_tools import (
    PROMPT,
    START_SECONDS,
    Words,
    body,
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
CLIENTS = 32
SECONDS = 60
METHODS = [
    {"method": "none"},
    {"method": "vispruner", "visual_token_num": 64},
    {"method": "fastv", "visual_token_num": 32},
]
needs_playground = pytest.mark.skipif(
    not (playground.ROOT / playground.CHECKPOINT / "config.json").is_file(),
    reason="the playground checkpoint is not there",
)


async def ask(client: httpx.AsyncClient, url: str, **changes) -> str:
    """What became of one request: "answered", "refused CAUSE" or "lost WHY"."""
    try:
        reply = await client.post(url + STREAM, json=body(**changes))
        chunks = chunks_of(reply.content)
    except (httpx.HTTPError, AssertionError, ValueError) as error:
        return f"lost {type(error).__name__}"
    last = chunks[-1]
    if reply.status_code == 200 and last["error_code"] == 0:
        return "answered"
    return f"refused {last['cause']}" if last.get("cause") else "lost without a cause"


async def ends_of_answers(url: str, request: dict, number: int, deed) -> list[dict]:
    """The last chunks of so many answers at once; `deed()` is done when all have begun."""
    begun = 0

    async def client():
        nonlocal begun
        received = b""
        async with (
            httpx.AsyncClient(timeout=120) as http,
            http.stream("POST", url + STREAM, json=request) as reply,
        ):
            async for piece in reply.aiter_raw():
                begun += not received
                if not received and begun == number:
                    deed()
                received += piece
        return json.loads(received.split(b"\0")[-2])

    return await asyncio.gather(*(client() for _ in range(number)))


async def many_clients(url: str, until, **changes) -> Counter:
    """Outcomes of `CLIENTS` clients that ask again and again while `until()` is false."""
    outcomes: Counter = Counter()

    async def client(number: int):
        async with httpx.AsyncClient(timeout=120) as http:
            while not until(outcomes):
                pruning = METHODS[(number + outcomes.total()) % len(METHODS)]
                more = {"pruning": pruning} if "images" in changes else {}
                outcome = await ask(http, url, **changes, **more)
                outcomes[outcome] += 1
                if outcome != "answered":
                    await asyncio.sleep(0.5)

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return outcomes


def test_of_many_clients_each_is_answered_or_refused_with_a_cause():
    backend = Words(words="abcd", pause=0.01, gate=threading.Event())

    def enough(found: Counter) -> bool:
        if found["refused busy"] >= CLIENTS - 12:  # all places are taken
            backend.gate.set()
        return found["answered"] > 40

    with live(words_app(backend, places=12)) as worker:
        outcomes = asyncio.run(many_clients(worker, enough))
    assert set(outcomes) == {"answered", "refused busy"}
    assert outcomes["answered"] == backend.answered
    assert backend.running == 0


def test_when_a_worker_dies_the_next_request_goes_to_another_and_back_when_it_returns():
    port = free_port()
    with live_controller() as (address, controller), live(words_app()) as second:

        def register(worker):
            content = {"worker_name": worker, "check_heart_beat": True, "worker_status": None}
            patient_post(f"{address}/register_worker", json=content)

        def post():
            return chunks_of(patient_post(address + STREAM, json=body(model="echo")).content)[-1]

        with live(words_app(Words(words=["first"])), port) as first:
            register(first)
            assert post()["text"].endswith("first")
            register(second)
        assert [post()["text"].split()[-1] for _ in range(3)] == ["three"] * 3
        assert list(controller.table.workers) == [second]
        with live(words_app(Words(words=["first"])), port) as first:
            register(first)
            wait_for(lambda: post()["text"].endswith("first"))


# --- Real processes on the playground


@contextmanager
def process(module: str, *arguments):
    """`python -m llava.serve.MODULE`, killed at the end."""
    command = [sys.executable, "-m", f"llava.serve.{module}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def models(controller: str) -> list[str]:
    try:
        return patient_post(f"{controller}/list_models").json()["models"]
    except httpx.HTTPError:
        return []


def queue_length(address: str) -> int:
    """Of a worker, or of all that a controller knows."""
    return httpx.post(f"{address}/worker_get_status", timeout=30).json()["queue_length"]


def resident_bytes(running: subprocess.Popen) -> int:
    pages = int(Path(f"/proc/{running.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def worker_process(controller: str, port: int, *more):
    address = f"http://127.0.0.1:{port}"
    arguments = ["--host", "127.0.0.1", "--port", port, "--device", "cpu", *more]
    with process("model_worker", *arguments, "--controller", controller) as running:
        yield running, address


def is_up(address: str) -> bool:
    try:
        return httpx.post(f"{address}/worker_get_status", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def controller():
    port = free_port()
    with process("controller", "--host", "127.0.0.1", "--port", port):
        yield f"http://127.0.0.1:{port}"


@pytest.mark.slow
@needs_playground
def test_a_minute_of_32_clients_loses_nothing_and_memory_stays_flat(controller):
    with worker_process(controller, free_port(), "--max-queue", 12) as (running, worker):
        (model,) = wait_for(lambda: models(controller), seconds=START_SECONDS)
        image = png(320, 240)
        request = {"model": model, "images": [image], "prompt": PROMPT}

        def load(seconds):
            end = time.monotonic() + seconds

            def enough(found: Counter) -> bool:
                return time.monotonic() > end and found["answered"] >= 50

            return asyncio.run(many_clients(worker, enough, **request))

        load(SECONDS / 4)  # buffers reach their size
        before = resident_bytes(running)
        outcomes = load(SECONDS)
        grown = resident_bytes(running) - before
        print(f"{dict(outcomes)}, memory {before >> 20} MiB, grown by {grown / 2**20:.1f} MiB")
        assert set(outcomes) <= {"answered", "refused busy"} and outcomes["answered"]
        assert grown < 64 * 2**20
        wait_for(lambda: queue_length(controller) == 0)


@pytest.mark.slow
@needs_playground
def test_a_worker_killed_in_between_is_replaced_and_used_again_when_it_is_back(controller):
    ports = free_port(), free_port()
    with worker_process(controller, ports[1]) as (_, second):
        wait_for(lambda: is_up(second), seconds=START_SECONDS)
        with worker_process(controller, ports[0]) as (first_process, first):
            (model,) = wait_for(lambda: models(controller), seconds=START_SECONDS)
            wait_for(lambda: is_up(first), seconds=START_SECONDS)

            def get_address():
                reply = patient_post(f"{controller}/get_worker_address", json={"model": model})
                return reply.json()["address"]

            wait_for(lambda: {get_address() for _ in range(4)} == {first, second})
            # At this temperature any of the 490 tokens comes next, so an answer takes seconds; some
            # are over sooner, hence eight of them, which the workers share.
            request = body(model=model, max_new_tokens=900, temperature=5.0, stop=None)
            ends = asyncio.run(ends_of_answers(controller, request, 8, first_process.kill))
            assert {(end["error_code"], end.get("cause")) for end in ends} == {
                (0, None),
                (3, "worker_died"),
            }
            for _ in range(4):
                short = body(model=model)
                reply = httpx.post(controller + STREAM, json=short, timeout=60)
                assert chunks_of(reply.content)[-1]["error_code"] == 0
            assert {get_address() for _ in range(4)} == {second}
            with worker_process(controller, ports[0]):
                wait_for(lambda: first in {get_address() for _ in range(4)}, seconds=START_SECONDS)
