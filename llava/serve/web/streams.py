"""Replies that last as long as their visitor stays: there are at most so many, the oldest goes."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager


class Streams:
    """places: replies of one kind that may go on at a time"""

    def __init__(self, places: int):
        self.places = places
        self._ends: dict[asyncio.Event, None] = {}  # of those that go on, the oldest first

    @contextmanager
    def enter(self, receive):
        """Inside of the block one more reply goes on. Yields `receive` of the application, which
        says that the visitor has left once the place is needed for somebody else."""
        end = asyncio.Event()
        self._ends[end] = None
        while len(self._ends) > self.places:
            oldest = next(iter(self._ends))
            del self._ends[oldest]
            oldest.set()
        try:
            yield _until(end, receive)
        finally:
            self._ends.pop(end, None)


def _until(end: asyncio.Event, receive):
    async def receive_or_leave():
        if end.is_set():
            return {"type": "http.disconnect"}
        message = asyncio.ensure_future(receive())
        ended = asyncio.ensure_future(end.wait())
        try:
            await asyncio.wait({message, ended}, return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() else {"type": "http.disconnect"}
        finally:
            message.cancel()
            ended.cancel()

    return receive_or_leave
