"""Waiting: for a turn at the server behind an `sglang_worker`, for a model that is still coming."""

from __future__ import annotations

import asyncio
import json
from itertools import count
from types import SimpleNamespace

import httpx
import pytest

from llava.serve import demo, sglang_worker
from llava.serve.protocol import GenerateRequest
from llava.serve.sglang_worker import Forwarder
from tests.serve.serve_tools import STREAM, body, chunks_of, words_app
from tests.serve.test_programs import sse, upstream

EVENTS = {"content-type": "text/event-stream"}


def test_a_server_gets_so_many_requests_at_once_and_the_others_wait(monkeypatch):
    monkeypatch.setattr(sglang_worker, "KEEP_ALIVE_SECONDS", 0.01)
    under_way, most = 0, []

    async def answer(request):
        nonlocal under_way
        under_way += 1
        most.append(under_way)
        await asyncio.sleep(0.1)
        under_way -= 1
        return httpx.Response(200, content=sse({"text": "A cat"}, "[DONE]"), headers=EVENTS)

    forwarder = Forwarder("http://s", "m", transport=httpx.MockTransport(answer), at_once=2)
    app = words_app(forwarder, places=6)

    async def ask_all():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            asked = (client.post(STREAM, json=body(prompt="Hi ")) for _ in range(6))
            return await asyncio.gather(*asked)

    answers = [chunks_of(reply.content) for reply in asyncio.run(ask_all())]
    assert max(most) == 2 and len(most) == 6
    assert all(chunks[-1]["text"] == "Hi A cat" for chunks in answers)
    assert max(answers, key=len)[0]["text"] == "Hi ", "a sign of life"


async def leave(chunks) -> None:
    """As a client that waits for the next chunk and goes away."""
    waiting = asyncio.ensure_future(anext(chunks))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await chunks.aclose()


def test_a_client_that_leaves_while_it_waits_for_the_server_leaves_its_turn_to_others():
    content = sse({"text": "A cat"}, "[DONE]")
    forwarder = Forwarder("http://s", "m", transport=upstream(content, []), at_once=1)

    async def leave_and_ask():
        jobs = [await forwarder.prepare(GenerateRequest(prompt="Hi "), "1") for _ in range(3)]
        first, second, third = map(forwarder.stream, jobs)
        await anext(first)
        await leave(second)
        await first.aclose()
        return [chunk async for chunk in third]

    (chunk,) = asyncio.run(asyncio.wait_for(leave_and_ask(), 60))
    assert b"A cat" in chunk


@pytest.mark.parametrize("events_before", [0, 1])
def test_a_server_that_is_silent_is_no_reason_for_the_client_to_give_up(monkeypatch, events_before):
    """Clients of LLaVA stop after 10 s without a byte."""
    monkeypatch.setattr(sglang_worker, "KEEP_ALIVE_SECONDS", 0.01)

    class Slow(httpx.AsyncByteStream):
        async def __aiter__(self):
            yield sse(*[{"text": "A"}] * events_before)
            await asyncio.sleep(0.1)
            yield sse({"text": "A cat"}, "[DONE]")

    reply = httpx.Response(200, stream=Slow(), headers=EVENTS)
    forwarder = Forwarder("http://s", "m", transport=httpx.MockTransport(lambda _: reply))

    async def ask():
        job = await forwarder.prepare(GenerateRequest(prompt="Hi "), "1")
        return [json.loads(chunk.rstrip(b"\0"))["text"] async for chunk in forwarder.stream(job)]

    texts = asyncio.run(ask())
    assert len(texts) > 3 and texts[-1] == "Hi A cat"
    assert set(texts[:-1]) == {"Hi A" if events_before else "Hi "}


def test_a_client_that_leaves_while_the_server_is_silent_ends_the_request_there():
    closed = []

    class Silent(httpx.AsyncByteStream):
        async def __aiter__(self):
            yield sse({"text": "A"})
            await asyncio.sleep(600)

        async def aclose(self):
            closed.append(True)

    reply = httpx.Response(200, stream=Silent(), headers=EVENTS)
    forwarder = Forwarder("http://s", "m", transport=httpx.MockTransport(lambda _: reply))

    async def read_and_leave():
        chunks = forwarder.stream(await forwarder.prepare(GenerateRequest(prompt="Hi "), "1"))
        await anext(chunks)
        await leave(chunks)

    asyncio.run(asyncio.wait_for(read_and_leave(), 60))
    assert closed == [True]


def test_the_demo_waits_for_a_model_as_long_as_its_worker_lives(monkeypatch, capsys):
    """A model that is downloaded takes hours where the line is slow."""
    clock, there, open_ports = count(0, 400), [True, *[False] * 9, True], [True]

    def sleep(seconds):
        if not open_ports:  # all is there: the visitor has seen enough
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=sleep))
    quiet = SimpleNamespace(signal=lambda *_: None, SIGINT=2, SIGTERM=15, SIG_IGN=1)
    monkeypatch.setattr(demo, "signal", quiet)
    monkeypatch.setattr(demo, "answers", lambda *_: there.pop(0))
    monkeypatch.setattr(demo.direct, "check_place", lambda *_: None)
    monkeypatch.setattr(demo, "is_listening", lambda *_: open_ports.pop(0))
    monkeypatch.setattr(demo.Demo, "start", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        demo.run(demo.build_parser().parse_args([]), [])
    assert "The demo is at http://127.0.0.1:7860" in capsys.readouterr().out
