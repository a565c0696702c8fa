"""ASGI middleware in front of gradio: only what the page needs gets through, and within limits.

Gradio serves more than this page uses: a proxy, redirects to any address, a REST interface,
downloads of files named by URL. Every request is checked against a list of what is needed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from urllib.parse import unquote, urlsplit

from ..errors import new_request_id
from .uploads import Refused, check_upload

logger = logging.getLogger("llava.serve.web")
API = "/gradio_api"
GETS = re.compile(
    rf"/|/(config|favicon\.ico|robots\.txt|manifest\.json|theme\.css)/?|/(assets|static|svelte)/.+"
    rf"|{API}/(info|app_id|startup-events|theme\.css|upload_progress|queue/data)/?"
    rf"|{API}/heartbeat/[\w-]+|{API}/file=.+|/pwa_icon(/\d+)?",
    re.S,
)
POSTS = re.compile(rf"{API}/(upload|queue/join|cancel|reset)/?")
JSON_BYTES = 2**18  # of a request that carries no file
UPLOAD_BYTES = 12 * 2**20
BODY_SECONDS = 120  # until the body of a request has arrived; phones upload slowly
URL_CHARACTERS = 2048
LOOPBACK = ("localhost", "127.0.0.1", "::1")

#: nothing is loaded from, or sent to, another place, whatever an answer contains
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; form-action 'self'; "
    "base-uri 'self'; object-src 'none'; frame-ancestors {frames}"
)


class Guard:
    """Refuses requests with 4xx before gradio sees them, and adds security headers to replies.

    functions: number of an event's function -> how many values it takes
    hosts:     names under which the page may be asked for, None for any (a check against pages of
               other sites that let their name point here)
    embed:     whether other sites may show the page in a frame
    uploads:   folder of uploaded images, whose size is bounded
    """

    def __init__(
        self,
        app,
        functions: dict[int, int],
        hosts: tuple[str, ...] | None = LOOPBACK,
        embed: bool = False,
        uploads: str | None = None,
    ):
        self.app, self.functions, self.hosts, self.uploads = app, functions, hosts, uploads
        self.policy = POLICY.format(frames="*" if embed else "'self'")

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # the page uses no web sockets: nobody answers
        try:
            headers = _headers(scope)
            self._check_head(scope, headers)
            if scope["method"] == "POST":
                body = await _read_in_time(receive, headers, scope["path"])
                await self._check_body(scope["path"], headers, body)
                receive = _replay(body, receive)
        except Refused as refused:
            await _refuse(send, refused)
            return
        await self.app(scope, receive, self._with_headers(send))

    def _check_head(self, scope, headers: dict[str, str]) -> None:
        method, path = scope["method"], scope["path"]
        if len(path) + len(scope.get("query_string", b"")) > URL_CHARACTERS:
            raise Refused(414, "The address is too long.")
        host = _name(f"//{headers.get('host', '')}")
        if self.hosts is not None and host not in self.hosts:
            raise Refused(421, "This page is not served under that name.")
        origin = headers.get("origin")
        if origin is not None and method == "POST":
            if urlsplit(origin).netloc != headers.get("host"):
                raise Refused(403, "Requests from pages of other sites are not accepted.")
        if method in ("GET", "HEAD"):
            if not GETS.fullmatch(path) or _leaves(path):
                raise Refused(404, "There is nothing here.")
        elif method != "POST":
            raise Refused(405, "Only GET and POST are understood.")
        elif not POSTS.fullmatch(path):
            raise Refused(404, "There is nothing here.")

    async def _check_body(self, path: str, headers: dict[str, str], body: bytes) -> None:
        if path.startswith(f"{API}/upload"):
            kind = headers.get("content-type", "")
            await asyncio.to_thread(check_upload, kind, body, self.uploads)
            return
        event = _read_json(body)
        _check_files(event)
        if path.startswith(f"{API}/queue/join"):
            self._check_event(event)

    def _check_event(self, event: dict) -> None:
        number, data, session = (event.get(key) for key in ("fn_index", "data", "session_hash"))
        known = type(number) is int and number in self.functions
        if not known or not isinstance(data, list) or len(data) != self.functions[number]:
            raise Refused(400, "The page has no event like this.")
        if not isinstance(session, str) or not re.fullmatch(r"\w{1,64}", session):
            raise Refused(400, "The session has no valid name.")

    def _with_headers(self, send):
        added = [
            (b"content-security-policy", self.policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
        ]

        async def with_headers(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        return with_headers


def _headers(scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _leaves(path: str) -> bool:
    """Whether a path names another place: a URL behind file=, a share, or a folder above."""
    path = unquote(path)  # once more than the server did, for what was encoded twice
    target = path.partition("file=")[2]
    outside = re.match(r"[/\\]{2}|[a-zA-Z][\w+.-]*:", target.strip())
    return bool(outside) or ".." in re.split(r"[/\\]", path) or "\0" in path


async def _read_in_time(receive, headers: dict[str, str], path: str) -> bytes:
    try:
        return await asyncio.wait_for(_read(receive, headers, path), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Refused(408, "The request took too long to arrive.") from None


async def _read(receive, headers: dict[str, str], path: str) -> bytes:
    limit = UPLOAD_BYTES if path.startswith(f"{API}/upload") else JSON_BYTES
    too_large = Refused(413, f"The request is larger than {limit / 2**20:g} MB.")
    length = headers.get("content-length", "0")
    if not length.isdecimal():
        raise Refused(400, "The length of the request is not a number.")
    if len(length) > 12 or int(length) > limit:
        raise too_large
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "The request ended early.")
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_large
        if not message.get("more_body"):
            return bytes(body)


def _read_json(body: bytes) -> dict:
    try:
        data = json.loads(body or b"{}")
        json.dumps(data, ensure_ascii=False).encode()  # half characters cannot be sent back
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The request is not valid JSON.") from error
    if not isinstance(data, dict):
        raise Refused(400, "The request is not a JSON object.")
    return data


def _check_files(data) -> None:
    """Refuses files that gradio would fetch by URL, or decode out of the request."""
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
            path, url = value.get("path"), value.get("url")
            if isinstance(path, str) and re.match(r"\s*[a-zA-Z][\w+.-]*:", path):
                raise Refused(400, "Files are uploaded, not fetched from an address.")
            if isinstance(url, str) and url.strip().lower().startswith("data:"):
                raise Refused(400, "Files are uploaded, not sent inside of a request.")


def _replay(body: bytes, receive):
    sent = False

    async def replay():
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(send, refused: Refused) -> None:
    number = new_request_id()
    logger.info("request %s: refused, %s", number, refused.status)
    text = f"{refused.sentence} [refused, request {number}]"
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
