"""A worker's ties to its controller: it registers, and says regularly that it lives."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import httpx

from ..constants import WORKER_HEART_BEAT_INTERVAL
from ..log_output import error_places
from .auth import token_headers

RETRY_SECONDS = 5.0
CALL_SECONDS = 5.0
LEAST_SECONDS = 0.5  # between two beats, however many requests come and go

logger = logging.getLogger(__name__)


class HeartBeat:
    """
    controller: address of the controller
    worker:     address of this worker, as the controller and clients are to call it
    status:     returns what the worker says about itself
    """

    def __init__(
        self,
        controller: str,
        worker: str,
        status: Callable[[], dict],
        token: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        self.controller, self.worker, self.status = controller.rstrip("/"), worker, status
        self.client = httpx.AsyncClient(
            headers=token_headers(token),
            timeout=CALL_SECONDS,
            transport=transport,
            follow_redirects=False,
            trust_env=False,
        )
        self._news = asyncio.Event()

    def nudge(self) -> None:
        """The length of the queue changed."""
        self._news.set()

    async def run(self) -> None:
        """Registers and beats until cancelled; whatever fails is tried again."""
        registered = False
        while True:
            try:
                registered = await (self.beat() if registered else self.register())
                wait = WORKER_HEART_BEAT_INTERVAL if registered else 0
            except httpx.HTTPStatusError as error:
                logger.error(
                    "the controller refuses this worker (status %s): is the token the same, and "
                    "the address allowed there (--allow-worker)?",
                    error.response.status_code,
                )
                wait = RETRY_SECONDS
            except (httpx.HTTPError, ValueError) as error:
                logger.warning(
                    "no answer from the controller at %s (%s): trying again every %s s",
                    self.controller,
                    type(error).__name__,
                    RETRY_SECONDS,
                )
                wait = RETRY_SECONDS
            except Exception as error:  # a worker that goes silent is forgotten by the controller
                logger.error("the heart beat failed: %s", error_places(error))
                wait = RETRY_SECONDS
            await asyncio.sleep(LEAST_SECONDS)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), wait)
            self._news.clear()

    async def register(self) -> bool:
        body = {
            "worker_name": self.worker,
            "check_heart_beat": True,
            "worker_status": self.status(),
        }
        await self._post("/register_worker", body)
        logger.info("registered at the controller")
        return True

    async def beat(self) -> bool:
        """Whether the controller still knows this worker."""
        body = {"worker_name": self.worker, "queue_length": self.status()["queue_length"]}
        reply = await self._post("/receive_heart_beat", body)
        if not isinstance(reply, dict) or "exist" not in reply:
            raise ValueError("no reply of a controller")
        return bool(reply["exist"])

    async def leave(self) -> None:
        """Makes the controller look for this worker, which does not answer any more."""
        with suppress(Exception):  # whatever it is, the worker ends
            await self._post("/report_worker", {"worker_name": self.worker})
        await self.client.aclose()

    async def _post(self, path: str, body: dict):
        reply = await self.client.post(self.controller + path, json=body)
        reply.raise_for_status()
        return reply.json()
