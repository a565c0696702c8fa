"""How an answer ends whose client leaves or stops reading, or whose worker is stopped."""

from __future__ import annotations

import threading

import pytest
import uvicorn

from llava.serve.outbox import CHUNKS, Aborted, Outbox
from tests.ports import free_port
from tests.serve.serve_tools import (
    STREAM,
    Words,
    ask_and_leave,
    body,
    chunks_of,
    live,
    patient_post,
    patient_stream,
    wait_for,
    words_app,
)


def test_a_client_that_leaves_while_it_waits_is_noticed_at_once():
    backend = Words(pause=600)
    with live(words_app(backend)) as address:
        ask_and_leave(address, lambda: backend.running == 1)
        wait_for(lambda: backend.closed == 1)
        assert patient_post(f"{address}/worker_get_status").json()["queue_length"] == 0


def test_a_reader_that_stops_reading_loses_its_answer():
    class Loop:
        def call_soon_threadsafe(self, *_):
            pass

    outbox = Outbox(Loop(), stall_seconds=0.05)
    for _ in range(CHUNKS):
        outbox.put({})
    with pytest.raises(Aborted):
        outbox.put({})


def test_a_stopped_worker_finishes_what_it_has_begun():
    backend = Words(words="abcdefgh", pause=0.1)
    app = words_app(backend)
    port = free_port()
    config = uvicorn.Config(app, port=port, log_level="error", timeout_graceful_shutdown=10)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started)
    with patient_stream("POST", f"http://127.0.0.1:{port}{STREAM}", json=body()) as reply:
        pieces = reply.iter_raw()
        received = next(pieces)
        server.should_exit = True
        received += b"".join(pieces)
    thread.join(10)
    assert chunks_of(received)[-1]["text"].endswith("g h")
    assert not thread.is_alive()
