"""Which workers a controller talks to, and the one way it talks to them.

Requests go to the numeric address that was checked (no second look-up that could answer otherwise),
follow no redirect, use no proxy of the environment, and read a bounded reply.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx

from ..network import allowed_place, is_loopback
from .auth import token_headers
from .errors import ServeError

CONNECT_SECONDS = 5.0
PORTS = {"http": 80, "https": 443}


class WorkerAddresses:
    """The allow-list. Loopback is always on it, for callers on this machine: what listens there is
    none of the business of others.

    entries: HOST or HOST:PORT each; HOST is a name or a number, as workers will call themselves
    """

    def __init__(self, entries: Iterable[str] = ()):
        self.allowed = {allowed_place(text, "--allow-worker") for text in entries}

    def check(self, address: str, here: bool = True) -> str:
        """The address in its normal form. Raises ServeError unless it is allowed.

        here: whether the caller is on this machine
        """
        address = normal(address)
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
        listed = (host, port) in self.allowed or (host, None) in self.allowed
        if not listed and not (here and is_loopback(host)):
            raise ServeError(
                "forbidden",
                "This worker address is not allowed; start the controller with "
                "--allow-worker HOST:PORT.",
            )
        return address


def normal(address: str) -> str:
    """`address` as SCHEME://HOST:PORT. Raises ServeError when it has other parts."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ServeError("bad_request", "worker_name is not an address.") from None
    plain = parts.path in ("", "/") and not any(mark in address for mark in "?#@\\")
    printable = address.isascii() and address.isprintable() and " " not in address
    if parts.scheme not in PORTS or not host or not plain or port == 0 or not printable:
        raise ServeError("bad_request", "worker_name must have the form http://HOST:PORT.")
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}:{port or PORTS[parts.scheme]}"


async def resolve(host: str, port: int) -> list[str]:
    """Numeric addresses of `host`. Raises ServeError when one is no place a worker can be at."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise httpx.ConnectError("unknown host") from error
    numbers = list(dict.fromkeys(entry[4][0] for entry in found))
    for text in numbers:
        number = ipaddress.ip_address(text.split("%")[0])
        number = getattr(number, "ipv4_mapped", None) or number
        # Link-local addresses are where clouds keep the credentials of a machine.
        if number.is_link_local or number.is_multicast or number.is_unspecified:
            raise ServeError("forbidden", "This worker address is not allowed.")
    return numbers


class WorkerClient:
    """Sends requests to workers whose addresses were checked.

    token:     the shared secret
    transport: replaces the network, for tests
    """

    def __init__(self, token: str | None = None, transport: httpx.AsyncBaseTransport | None = None):
        self.transport = transport
        self.client = httpx.AsyncClient(
            transport=transport,
            headers={
                "User-Agent": "LLaVA Controller",
                "Accept-Encoding": "identity",  # what is read is not larger than what was sent
                **token_headers(token),
            },
            follow_redirects=False,
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def close(self) -> None:
        await self.client.aclose()

    @asynccontextmanager
    async def post(
        self, address: str, path: str, body: bytes | None, seconds: float, request_id: str = ""
    ):
        """The response, body unread. Raises httpx.HTTPError, ServeError on a forbidden address.

        seconds: longest silence
        """
        url = httpx.URL(address + path)
        hosts = [url.host] if self.transport else await resolve(url.host, url.port)
        headers = {"Host": url.netloc.decode()}
        if request_id:
            headers["X-Request-Id"] = request_id
        if body is not None:
            headers["Content-Type"] = "application/json"
        for number, host in enumerate(hosts):
            request = self.client.build_request(
                "POST",
                url.copy_with(host=host),
                content=body,
                headers=headers,
                timeout=httpx.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS)),
                extensions={"sni_hostname": url.host},
            )
            try:
                response = await self.client.send(request, stream=True)
                break
            except httpx.ConnectError:
                if number == len(hosts) - 1:
                    raise
        try:
            yield response
        finally:
            await response.aclose()

    async def ask(self, address: str, path: str, seconds: float, most_bytes: int) -> bytes:
        """The body of a reply with status 200. Raises httpx.HTTPError when there is none in time,
        ServeError on a forbidden address."""
        try:
            return await asyncio.wait_for(self._ask(address, path, seconds, most_bytes), seconds)
        except asyncio.TimeoutError as error:
            raise httpx.ReadTimeout("no answer in time") from error

    async def _ask(self, address: str, path: str, seconds: float, most_bytes: int) -> bytes:
        async with self.post(address, path, None, seconds) as response:
            if response.status_code != 200:
                raise httpx.HTTPError(f"status {response.status_code}")
            body = bytearray()
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > most_bytes:
                    raise httpx.HTTPError("reply too large")
            return bytes(body)
