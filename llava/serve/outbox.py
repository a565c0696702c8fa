"""Chunks on their way from a thread or another server to the coroutine that sends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator

CHUNKS = 16  # that wait to be sent before the thread has to


class Aborted(Exception):
    """Nobody reads the answer any more."""


class Outbox:
    """A bounded queue from one thread to one coroutine.

    stall_seconds: a reader that takes nothing for so long is given up
    """

    _END = object()

    def __init__(self, loop: asyncio.AbstractEventLoop, stall_seconds: float):
        self.loop, self.stall_seconds = loop, stall_seconds
        self._queue: asyncio.Queue = asyncio.Queue()
        self._room = threading.Semaphore(CHUNKS)
        self._closed = threading.Event()

    def put(self, chunk: dict) -> None:
        """Thread side: adds a chunk, waiting for room. Raises Aborted when nobody reads."""
        if not self._room.acquire(timeout=self.stall_seconds) or self._closed.is_set():
            raise Aborted
        self._call(chunk)

    def end(self) -> None:
        """Thread side: nothing more will come."""
        self._call(self._END)

    def _call(self, item) -> None:
        try:
            self.loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the loop is closed: the server is gone
            raise Aborted from None

    async def chunks(self, pause: float):
        """Reader side: the chunks in order; None whenever nothing came for `pause` seconds."""
        pending = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(self._queue.get())
                done, _ = await asyncio.wait({pending}, timeout=pause)
                if not done:
                    yield None
                    continue
                item, pending = pending.result(), None
                if item is self._END:
                    return
                self._room.release()
                yield item
        finally:
            if pending is not None:
                pending.cancel()

    def is_closed(self) -> bool:
        """Whether nobody reads any more."""
        return self._closed.is_set()

    def close(self) -> None:
        """Reader side: nobody reads any more; the thread learns it at its next chunk."""
        self._closed.set()
        self._room.release()


async def with_pauses(items: AsyncGenerator, pause: float):
    """The items in order; None whenever none came for `pause` seconds. Closes `items` at the end,
    also while it waits for its next one."""
    pending = None
    try:
        while True:
            pending = pending or asyncio.ensure_future(anext(items))
            done, _ = await asyncio.wait({pending}, timeout=pause)
            if not done:
                yield None
                continue
            try:
                item, pending = pending.result(), None
            except StopAsyncIteration:
                return
            yield item
    finally:
        if pending is not None and pending.cancel():
            await asyncio.wait({pending})
        await items.aclose()
