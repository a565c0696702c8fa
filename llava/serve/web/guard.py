"""ASGI middleware in front of gradio: only what the page needs gets through, and within limits.

Gradio serves more than this page uses: a proxy, redirects to any address, a REST interface,
downloads of files named by URL. Every request is checked against a list of what is needed.
"""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import nullcontext, suppress
from urllib.parse import parse_qs, unquote, urlsplit

from llava.log_output import NO_SPACE, error_places

from ..errors import new_request_id
from .events import checked_event, query_name
from .streams import Streams
from .uploads import Refused, as_form, checked_upload

logger = logging.getLogger("llava.serve.web")
API = "/gradio_api"
GETS = re.compile(
    rf"/|/(config|favicon\.ico|robots\.txt|manifest\.json|theme\.css)/?|/(assets|static|svelte)/.+"
    rf"|{API}/(info|app_id|startup-events|theme\.css|upload_progress|queue/data)/?"
    rf"|{API}/heartbeat/[\w-]{{1,64}}|{API}/file=.+",
    re.S | re.ASCII,
)
POSTS = re.compile(rf"{API}/(upload|queue/join|cancel|reset)/?")
JSON_BYTES = 2**18  # of a request that carries no file
UPLOAD_BYTES = 12 * 2**20
BODY_SECONDS = 120  # until the body of a request has arrived; phones upload slowly
URL_CHARACTERS = 2048
FORWARDING = ("x-forwarded-host", "x-forwarded-proto", "x-gradio-server")  # gradio reads them
FORWARDED = re.compile(r"[\w.,:/ \[\]-]{0,512}", re.ASCII)
#: last part of a path, or the one before -> replies of that kind that may go on at a time
STREAMS = {"heartbeat": 256, "data": 128, "upload_progress": 32}
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
    listens:   whether something is under way for the session of a name
    """

    def __init__(
        self,
        app,
        functions: dict[int, int],
        hosts: tuple[str, ...] | None = LOOPBACK,
        embed: bool = False,
        uploads: str | None = None,
        listens=lambda session: True,
    ):
        self.app, self.functions, self.hosts, self.uploads = app, functions, hosts, uploads
        self.listens = listens
        self.policy = POLICY.format(frames="*" if embed else "'self'")
        self.streams = {name: Streams(places) for name, places in STREAMS.items()}

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
                scope, body = await self._checked(scope, headers, body)
                receive = _replay(body, receive)
        except Refused as refused:
            await _refuse(send, refused)
            return
        # Whole files are small; gradio fails on ranges that are none.
        kept = [pair for pair in scope["headers"] if pair[0].lower() != b"range"]
        scope, stream = {**scope, "headers": kept}, self._stream(scope)
        with nullcontext(receive) if stream is None else stream.enter(receive) as receive:
            await self._pass_on(scope, receive, send)

    def _stream(self, scope) -> Streams | None:
        """The kind of reply that goes on for long; None for others."""
        parts = scope["path"].rstrip("/").split("/")[-2:]
        found = [self.streams[part] for part in parts if part in self.streams]
        return found[0] if found and scope["path"].startswith(API) else None

    async def _pass_on(self, scope, receive, send) -> None:
        """Lets gradio answer. Where it fails, one line says so, without anything of the request."""
        started = ended = False

        async def noting_send(message):
            nonlocal started, ended
            started = started or message["type"] == "http.response.start"
            await send(message)
            ended = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await self.app(scope, receive, self._with_headers(noting_send))
        except Exception as error:
            failed = _failure(error)
            if not started:
                await _refuse(send, failed, error)
            else:
                _log(failed.status, error, new_request_id())
        if started and not ended:
            with suppress(Exception):  # less than was announced: the connection breaks off
                await send({"type": "http.response.body", "body": b""})

    def _check_head(self, scope, headers: dict[str, str]) -> None:
        method, path = scope["method"], scope["path"]
        if len(path) + len(scope.get("query_string", b"")) > URL_CHARACTERS:
            raise Refused(414, "The address is too long.")
        host = _name(f"//{headers.get('host', '')}")
        if self.hosts is not None and host not in self.hosts:
            raise Refused(421, "This page is not served under that name.")
        if not all(FORWARDED.fullmatch(headers.get(name, "")) for name in FORWARDING):
            raise Refused(400, "The headers of the proxy in front are not valid.")
        origin = headers.get("origin")
        if origin is not None and method == "POST":
            if _place(origin) != headers.get("host"):
                raise Refused(403, "Requests from pages of other sites are not accepted.")
        if method in ("GET", "HEAD"):
            if not GETS.fullmatch(path) or _leaves(path) or _is_no_file(path):
                raise Refused(404, "There is nothing here.")
            self._check_query(path, scope.get("query_string", b""))
        elif method != "POST":
            raise Refused(405, "Only GET and POST are understood.")
        elif not POSTS.fullmatch(path):
            raise Refused(404, "There is nothing here.")
        else:
            self._check_query(path, scope.get("query_string", b""))

    def _check_query(self, path: str, query: bytes) -> None:
        if path.startswith(f"{API}/queue/data"):
            session = query_name(query, "session_hash")
            if session is None or not self.listens(session):
                raise Refused(404, "Nothing is under way for this session.")
        if path in ("/", "/config", "/config/"):
            query = parse_qs(query.decode("latin-1"))
            if "page" in query or "deep_link" in query:
                raise Refused(404, "There is nothing here.")
        elif path.startswith((f"{API}/upload_progress", f"{API}/upload")) and b"upload_id" in query:
            if query_name(query, "upload_id") is None:
                raise Refused(400, "The upload has no valid name.")

    async def _checked(self, scope, headers: dict[str, str], body: bytes) -> tuple[dict, bytes]:
        """Scope and body of a POST to hand on, both written anew: gradio reads what was checked."""
        kind = headers.get("content-type", "")
        if scope["path"].startswith(f"{API}/upload"):
            upload = await asyncio.to_thread(checked_upload, kind, body, self.uploads)
            kind, body = as_form(*upload)
        else:
            path, folder = scope["path"], self.uploads
            body = await asyncio.to_thread(checked_event, path, body, self.functions, folder)
            kind = "application/json"
        kept = [
            (name, value)
            for name, value in scope["headers"]
            if name.lower() not in (b"content-type", b"content-length", b"transfer-encoding")
        ]
        added = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(body))]
        return {**scope, "headers": kept + added}, body

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


def _place(url: str) -> str | None:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


def _leaves(path: str) -> bool:
    """Whether a path names another place: a URL behind file=, a share, or a folder above."""
    path = unquote(path)  # once more than the server did, for what was encoded twice
    target = path.partition("file=")[2]
    outside = re.match(r"[/\\]{2}|[a-zA-Z][\w+.-]*:", target.strip())
    return bool(outside) or ".." in re.split(r"[/\\]", path) or "\0" in path


def _is_no_file(path: str) -> bool:
    """Whether a part of a path is longer than any file's name."""
    return any(len(part.encode(errors="replace")) > 255 for part in path.split("/"))


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


def _replay(body: bytes, receive):
    sent = False

    async def replay():
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _failure(error: Exception) -> Refused:
    """What a visitor is told where gradio failed."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return Refused(507, "The page has no room left on its disk; try again later.")
    status = getattr(error, "status_code", 500)
    return Refused(status, "The page failed on this request; its log says where.")


def _log(status: int, error: Exception | None, number: str) -> None:
    if status < 500 or error is None:
        logger.info("request %s: refused, %s", number, status)
    else:
        logger.error("request %s: %s", number, error_places(error))


async def _refuse(send, refused: Refused, error: Exception | None = None) -> None:
    number = new_request_id()
    _log(refused.status, error, number)
    text = f"{refused.sentence} [refused, request {number}]"
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
