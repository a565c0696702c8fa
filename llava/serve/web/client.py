"""The page's side of the serving protocol: asks the controller for workers, and workers for text.

Protocol: POST with JSON; an answer is a stream of JSON chunks that end with a null byte.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from ..auth import token_headers
from ..errors import SEPARATOR
from ..limits import CHUNK_BYTES
from .failures import Failure, refusal

HEADERS = {"User-Agent": "LLaVA Client"}
CONNECT_SECONDS = 5
SILENCE_SECONDS = 120  # longest wait for the next piece of an answer
STATUS_SECONDS = 10
REFUSAL_BYTES = 2**14
TRIES = 3  # workers asked when one cannot be reached
#: its program ended, or its machine is off
UNREACHABLE = (httpx.ConnectError, httpx.ConnectTimeout)
#: models that are listed first
PRIORITY = {"vicuna-13b": "aaaaaaa", "koala-13b": "aaaaaab"}


@dataclass(frozen=True)
class Chunk:
    """text: prompt and answer so far; report: the raw pruning report, in the last chunk only."""

    text: str
    report: dict | None = None


class Service:
    """Controller and workers, as the page sees them.

    controller_url: address of the controller
    token:          shared secret of the demo, sent with every request
    transport:      replaces the network, for tests
    """

    def __init__(self, controller_url: str, token: str | None = None, transport=None):
        self.controller_url = controller_url.rstrip("/")
        self.headers = {**HEADERS, **token_headers(token)}
        self.transport = transport

    @asynccontextmanager
    async def _client(self, seconds: float):
        # Proxies of the environment and redirects would carry requests to places nobody named.
        async with httpx.AsyncClient(
            headers=self.headers,
            timeout=httpx.Timeout(seconds, connect=CONNECT_SECONDS),
            transport=self.transport,
            follow_redirects=False,
            trust_env=False,
        ) as client:
            yield client

    async def models(self, refresh: bool = True) -> list[str]:
        """Names of the models that have a worker, important ones first."""
        if refresh:
            await self._ask_controller("/refresh_all_workers")
        found = (await self._ask_controller("/list_models")).get("models", [])
        return sorted(map(str, found), key=lambda name: PRIORITY.get(name, name))

    async def worker(self, model: str) -> str:
        """Address of a worker for `model`. Raises Failure when there is none."""
        reply = await self._ask_controller("/get_worker_address", {"model": model})
        address = reply.get("address") or ""
        if urlsplit(address).scheme not in ("http", "https"):
            raise Failure("no_worker", model=model)
        return address.rstrip("/")

    async def status(self, model: str) -> dict:
        """Status of a worker for `model`; "pruning_methods" in it says what can be chosen."""
        for _ in range(TRIES):
            address = await self.worker(model)
            try:
                async with self._client(STATUS_SECONDS) as client:
                    reply = await client.post(f"{address}/worker_get_status")
                return reply.json() if reply.status_code == 200 else {}
            except UNREACHABLE:
                await self._report(address)
            except (httpx.HTTPError, ValueError):
                break
        return {}  # the question itself will say what is wrong

    async def answer(self, body: dict, request: str) -> AsyncIterator[Chunk]:
        """The chunks of one answer; `body` is the request of the protocol, with "model".

        Raises Failure when no worker answers, or one stops in between.
        """
        for attempt in range(TRIES):
            address = await self.worker(body["model"])
            try:
                async for chunk in self._stream(address, body, request):
                    yield chunk
                return
            except UNREACHABLE as error:
                await self._report(address)
                if attempt == TRIES - 1:
                    raise Failure("no_worker", model=body["model"]) from error
            except httpx.TimeoutException as error:
                raise Failure("worker_silent") from error
            except httpx.HTTPError as error:
                await self._report(address)
                raise Failure("worker_lost") from error

    async def _report(self, address: str) -> None:
        """A worker that just died stays listed until its heart beat is missed, or this is said."""
        with suppress(Failure):
            await self._ask_controller("/report_worker", {"worker_name": address})

    async def _stream(self, address: str, body: dict, request: str) -> AsyncIterator[Chunk]:
        async with (
            self._client(SILENCE_SECONDS) as client,
            client.stream(
                "POST",
                f"{address}/worker_generate_stream",
                json=body,
                headers={"X-Request-Id": request},
            ) as response,
        ):
            if response.status_code != 200:
                raise refusal(response.status_code, await _refusal_chunk(response))
            waiting = b""
            async for piece in response.aiter_bytes():
                *chunks, waiting = (waiting + piece).split(SEPARATOR)
                if len(waiting) > CHUNK_BYTES:
                    raise Failure("worker_reply")
                for chunk in filter(None, chunks):
                    yield _read_chunk(chunk)

    async def _ask_controller(self, path: str, body: dict | None = None) -> dict:
        try:
            async with self._client(STATUS_SECONDS) as client:
                reply = await client.post(self.controller_url + path, json=body)
            reply.raise_for_status()
            return reply.json() or {}
        except (httpx.HTTPError, ValueError) as error:
            raise Failure("no_controller") from error


def _read_chunk(data: bytes) -> Chunk:
    try:
        chunk = json.loads(data)
        text, code = str(chunk["text"]), int(chunk["error_code"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise Failure("worker_reply") from error
    if code:
        raise Failure(chunk.get("cause") or "worker_error", text, code)
    report = chunk.get("pruning_report")
    return Chunk(text, report if isinstance(report, dict) else None)


async def _refusal_chunk(response: httpx.Response) -> dict:
    """The chunk in the body of a refusal, {} when it holds none."""
    body = bytearray()
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > REFUSAL_BYTES:
            return {}
    try:
        chunk = json.loads(body.rstrip(SEPARATOR))
    except (ValueError, RecursionError):
        return {}
    return chunk if isinstance(chunk, dict) else {}
