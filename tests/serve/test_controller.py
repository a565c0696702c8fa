"""The controller: dispatch, registration, heart beats, and passing requests on."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter

import httpx
import pytest

from llava.constants import CONTROLLER_HEART_BEAT_EXPIRATION
from llava.serve import dispatch
from llava.serve.controller import controller_app
from llava.serve.dispatch import WorkerTable
from llava.serve.errors import ServeError
from llava.serve.heart_beat import HeartBeat
from llava.serve.protocol import WorkerStatus
from tests.serve.serve_tools import (
    PATIENCE,
    Words,
    body,
    call,
    chunks_of,
    live,
    live_controller,
    make_controller,
    patient_post,
    patient_stream,
    wait_for,
    words_app,
)

STREAM = "/worker_generate_stream"
W1, W2 = "http://127.0.0.1:1", "http://127.0.0.1:2"


def status(*names, speed=1, queue_length=0) -> dict:
    return {"model_names": list(names or ["echo"]), "speed": speed, "queue_length": queue_length}


def registration(address, worker_status=None, check_heart_beat=True) -> tuple[str, dict]:
    return "/register_worker", {
        "worker_name": address,
        "check_heart_beat": check_heart_beat,
        "worker_status": worker_status,
    }


def table_of(method, **speeds) -> WorkerTable:
    table = WorkerTable(method)
    for name, speed in speeds.items():
        table.register(name, WorkerStatus(**status(speed=float(speed))), True)
    return table


def test_the_lottery_draws_in_proportion_to_speed():
    table = table_of("lottery", slow=1, fast=3)
    drawn = Counter(table.choose("echo") for _ in range(2000))
    assert 0.68 < drawn["fast"] / 2000 < 0.82


def test_the_shortest_queue_for_its_speed_is_chosen_and_counted():
    table = table_of("shortest_queue", slow=1, fast=2)
    assert [table.choose("echo") for _ in range(6)] == [
        "slow",
        "fast",
        "fast",
        "slow",
        "fast",
        "fast",
    ]
    table.beat("slow", 0)
    assert table.choose("echo") == "slow"


@pytest.mark.parametrize("method", ["lottery", "shortest_queue"])
def test_a_worker_of_speed_zero_never_gets_a_request(method):
    assert table_of(method, idle=0).choose("echo") is None
    assert table_of(method, idle=0, busy=1).choose("echo") == "busy"


def test_a_full_table_refuses_new_workers_and_lets_known_ones_register_again(monkeypatch):
    monkeypatch.setattr(dispatch, "WORKERS", 2)
    table = table_of("lottery", first=1, second=1)
    with pytest.raises(ServeError, match="already has 2 workers"):
        table.register("third", WorkerStatus(**status()), True)
    table.register("first", WorkerStatus(**status(speed=5)), True)
    assert table.workers["first"].speed == 5 and list(table.workers) == ["first", "second"]


@pytest.mark.parametrize("method", ["lottery", "shortest_queue"])
def test_a_request_goes_to_a_worker_that_has_the_model(method):
    table = table_of(method, other=100)
    assert table.choose("name") is None
    table.register("own", WorkerStatus(**status("name", "echo", speed=1.0)), True)
    assert {table.choose("name") for _ in range(20)} == {"own"}


def test_silent_workers_are_dropped_unless_nobody_checks_them():
    table = table_of("lottery", silent=1, alive=1)
    table.register("unchecked", WorkerStatus(**status(speed=1.0)), False)
    for name in ("silent", "unchecked"):
        past = time.monotonic() - CONTROLLER_HEART_BEAT_EXPIRATION - 1
        table.workers[name].last_heart_beat = past
    assert table.drop_silent() == ["silent"]
    assert list(table.workers) == ["alive", "unchecked"]


def test_a_worker_registered_without_a_status_is_asked_for_it():
    with live(words_app()) as worker, live_controller() as (address, controller):
        patient_post(address + "/register_worker", json=registration(worker)[1])
        assert patient_post(address + "/list_models").json() == {"models": ["echo"]}
        assert patient_post(address + "/worker_get_status").json() == status(queue_length=0)
        path, unreachable = registration("http://127.0.0.1:9")
        refused = patient_post(address + path, json=unreachable)
        assert refused.status_code == 503 and "not registered" in refused.json()["text"]
        assert list(controller.table.workers) == [worker]


def test_refreshing_keeps_the_workers_that_answer_and_asks_all_at_once():
    replies, asked, both = {"127.0.0.1:1": 200, "127.0.0.1:2": 500}, [], asyncio.Event()

    async def reply(request):
        asked.append(request)
        if len(asked) == len(replies):
            both.set()
        await asyncio.wait_for(both.wait(), PATIENCE)
        text = json.dumps(status(queue_length=4)).encode()
        code = replies[request.url.netloc.decode()]
        return httpx.Response(code, stream=httpx.ByteStream(text))

    controller = make_controller(transport=httpx.MockTransport(reply))
    app = controller_app(controller)
    call(app, registration(W1, status()), registration(W2, status()))

    async def refresh_often():
        await asyncio.gather(*(controller.refresh() for _ in range(20)))

    asyncio.run(refresh_often())
    assert len(asked) == 2  # those who ask at the same time share one round
    assert list(controller.table.workers) == [W1]
    assert controller.table.workers[W1].queue_length == 4


def test_a_request_is_passed_on_to_a_worker_and_its_answer_back():
    with live(words_app()) as worker, live_controller() as (address, _):
        patient_post(address + "/register_worker", json=registration(worker)[1])
        reply = patient_post(address + STREAM, json=body(model="echo"))
        assert reply.status_code == 200 and "content-type" not in reply.headers
        chunks = chunks_of(reply.content)
        assert [chunk["text"].split()[-1] for chunk in chunks] == ["one", "two", "three"]
        refused = patient_post(address + STREAM, json=body(model="echo", temperature=-1))
        assert refused.status_code == 400
        assert chunks_of(refused.content)[0]["cause"] == "bad_request"


def test_without_a_worker_one_chunk_says_so():
    (reply,) = call(controller_app(make_controller()), (STREAM, body(model="echo")))
    (chunk,) = chunks_of(reply.content)
    assert reply.status_code == 503
    assert (chunk["error_code"], chunk["cause"]) == (2, "no_worker")


def test_a_worker_that_cannot_be_reached_is_dropped_and_the_next_one_asked():
    with live(words_app()) as worker, live_controller() as (address, controller):
        patient_post(
            address + "/register_worker", json=registration("http://127.0.0.1:9", status())[1]
        )
        patient_post(
            address + "/register_worker", json=registration(worker, status(queue_length=5))[1]
        )
        reply = patient_post(address + STREAM, json=body(model="echo"))
        assert chunks_of(reply.content)[-1]["text"].endswith("three")
        assert list(controller.table.workers) == [worker]


def broken_worker(first: bytes):
    """An application that sends `first` of an answer and hangs up."""

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        raise ConnectionAbortedError

    return app


def test_a_worker_that_dies_in_between_ends_the_stream_with_an_error():
    first = b'{"text": "so far", "error_code": 0}\0{"text": "half a ch'
    with live(broken_worker(first)) as worker, live_controller() as (address, controller):
        patient_post(address + "/register_worker", json=registration(worker, status())[1])
        chunks = chunks_of(patient_post(address + STREAM, json=body(model="echo")).content)
        assert [chunk["text"] for chunk in chunks][0] == "so far"
        assert (chunks[-1]["error_code"], chunks[-1]["cause"]) == (3, "worker_died")
        assert len(chunks) == 2 and worker not in chunks[-1]["text"]
        wait_for(lambda: not controller.table.workers)  # it gives no status


def test_a_worker_reported_as_gone_is_dropped_and_one_that_answers_stays():
    with live(words_app()) as worker, live_controller() as (address, controller):
        for name in (worker, "http://127.0.0.1:9"):
            patient_post(address + "/register_worker", json=registration(name, status())[1])

        def report(name):
            return patient_post(address + "/report_worker", json={"worker_name": name}).json()[
                "alive"
            ]

        assert [report(worker), report("http://127.0.0.1:9"), report(W1)] == [True, False, False]
        assert list(controller.table.workers) == [worker]


def test_a_client_that_hangs_up_ends_the_work_of_the_worker():
    backend = Words(words="a" * 1000, pause=0.02)
    with live(words_app(backend)) as worker, live_controller() as (address, _):
        patient_post(address + "/register_worker", json=registration(worker)[1])
        with patient_stream("POST", address + STREAM, json=body(model="echo")) as reply:
            pieces = reply.iter_raw()
            next(pieces)
            assert backend.running == 1
        wait_for(lambda: backend.running == 0)
        assert backend.answered == 0


def test_a_worker_registers_beats_and_registers_again_when_it_was_forgotten(monkeypatch):
    monkeypatch.setattr("llava.serve.heart_beat.LEAST_SECONDS", 0.01)
    monkeypatch.setattr("llava.serve.heart_beat.WORKER_HEART_BEAT_INTERVAL", 0.05)
    with live_controller() as (address, controller):
        beat = HeartBeat(address, W1, dict)
        with live(words_app(heart_beat=beat)):
            wait_for(lambda: W1 in controller.table.workers)
            controller.table.drop(W1)
            wait_for(lambda: W1 in controller.table.workers)
        wait_for(lambda: W1 not in controller.table.workers)  # it said that it leaves


def test_the_length_of_the_queue_reaches_the_controller(monkeypatch):
    monkeypatch.setattr("llava.serve.heart_beat.LEAST_SECONDS", 0.01)
    backend = Words(gate=threading.Event())
    with live_controller() as (address, controller):
        with live(words_app(backend, heart_beat=HeartBeat(address, W1, dict))) as worker:
            wait_for(lambda: W1 in controller.table.workers)
            with patient_stream("POST", worker + STREAM, json=body()) as reply:
                wait_for(lambda: controller.table.workers[W1].queue_length == 1)
                backend.gate.set()
                reply.read()
            wait_for(lambda: controller.table.workers[W1].queue_length == 0)


def test_a_worker_without_a_controller_keeps_trying(monkeypatch, caplog):
    monkeypatch.setattr("llava.serve.heart_beat.LEAST_SECONDS", 0.01)
    monkeypatch.setattr("llava.serve.heart_beat.RETRY_SECONDS", 0.02)
    answers = iter([httpx.Response(500), httpx.Response(200, json=None)])
    tries = []

    def reply(request):
        tries.append(request)
        if (response := next(answers, None)) is None:
            raise httpx.ConnectError("gone")
        return response

    async def run():
        beat = HeartBeat("http://127.0.0.1:1", W2, status, transport=httpx.MockTransport(reply))
        task = asyncio.ensure_future(beat.run())
        while len(tries) < 4 and not task.done():
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(run())
    assert "refuses this worker (status 500)" in caplog.text
    assert "controller at http://127.0.0.1:1 (ConnectError): trying again every" in caplog.text


def test_the_published_client_finds_a_worker_and_reads_its_stream():
    """As the original page does: requests, one address, chunks split at null bytes."""
    import requests

    with live(words_app()) as worker, live_controller() as (address, _):
        requests.post(address + "/register_worker", json=registration(worker)[1])
        reply = requests.post(address + "/get_worker_address", json={"model": "echo"})
        pload = {"model": "echo", **body(), "top_p": 0.7}
        stream = requests.post(
            reply.json()["address"] + STREAM,
            headers={"User-Agent": "LLaVA Client"},
            json=pload,
            stream=True,
            timeout=10,
        )
        texts = [
            json.loads(chunk.decode())["text"][len(pload["prompt"]) :].strip()
            for chunk in stream.iter_lines(decode_unicode=False, delimiter=b"\0")
            if chunk
        ]
    assert texts == ["one", "one two", "one two three"]
