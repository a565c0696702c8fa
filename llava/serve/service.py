"""What controller and workers have in common: the gate in front of them, replies, and the server.

The gate lets POST requests with a JSON body through, from programs that know the token. A browser
is no such program: whatever carries an `Origin` header is refused, so that no web page can talk to
a service on the machine of its reader.
"""

from __future__ import annotations

import asyncio
import logging
import re

from .errors import NEEDS_EXTRA, ServeError, encode_chunk, new_request_id

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise ImportError(NEEDS_EXTRA) from error

from ..log_output import error_places, log_to_stderr, protect_standard_streams
from .auth import is_authorized
from .connections import quiet_loggers, uvicorn_options
from .direct import check_place
from .limits import LIMITS, Limits
from .protocol import Body, parse

STREAM_PATH = "/worker_generate_stream"
GRACE_SECONDS = 10  # that answers in progress have when the service is stopped
LINES_PER_MINUTE = 1200  # of a log: strangers can have a line written with every request
REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

logger = logging.getLogger(__name__)


class Gate:
    """ASGI middleware: everything that can be refused before a body is parsed.

    token: the shared secret; None lets everybody in
    """

    def __init__(self, app, token: str | None = None, limits: Limits = LIMITS):
        self.app, self.token, self.limits = app, token, limits

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # web sockets are not spoken
        headers = {
            key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
        }
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def noting_send(message):
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            self._check(scope, headers)
            await self.app(scope, receive, noting_send)
        except ServeError as error:
            if not started:
                await refusal(error, scope)(scope, receive, send)
        except Exception as error:
            log_failure(error, request_id)
            if started:  # nothing can be said any more; the client sees the stream break
                raise ConnectionAbortedError(request_id) from None
            await refusal(internal_error(), scope)(scope, receive, send)

    def _check(self, scope, headers: dict[str, str]) -> None:
        if "origin" in headers:
            raise ServeError("forbidden", "Requests of web pages are not accepted.")
        if not is_authorized(headers.get("authorization"), self.token):
            raise ServeError("unauthorized", "The token is missing or wrong.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15:
            raise ServeError("bad_request", "Content-Length is not a number.")
        if int(length) > self.limits.body_bytes:
            raise _too_large(self.limits)
        has_body = int(length) > 0 or "transfer-encoding" in headers
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if has_body and kind != "application/json":
            raise ServeError(
                "not_json", "The body must be JSON, with Content-Type application/json."
            )
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ServeError("not_json", "Compressed bodies are not accepted.")


def _too_large(limits: Limits) -> ServeError:
    return ServeError(
        "too_large",
        f"The request is larger than {limits.body_bytes >> 20} MiB; send fewer or smaller images.",
    )


def internal_error() -> ServeError:
    return ServeError("internal", "The server failed on this request; its log says more.")


def log_failure(error: BaseException, request_id: str) -> None:
    """Logs where an error came from, but not its text: that may repeat what a user sent."""
    logger.error("request %s: %s", request_id, error_places(error))


def refusal(error: ServeError, scope) -> Response:
    """The reply to a request that is refused: a chunk, in a stream ended like one."""
    chunk = error.chunk(scope["state"]["request_id"])
    logger.info("request %s: refused, %s", chunk["request_id"], error.cause)
    headers = {"Retry-After": "2"} if error.status == 503 else None
    if scope["path"] == STREAM_PATH:
        return Response(encode_chunk(chunk), error.status, headers, "application/json")
    return JSONResponse(chunk, error.status, headers)


def request_id_of(request: Request) -> str:
    return request.scope["state"]["request_id"]


async def read(request: Request, kind: type[Body], limits: Limits = LIMITS) -> Body:
    """The JSON body of a request as an object of `kind`. Raises ServeError."""
    return parse(kind, await read_bytes(request, limits))


async def read_bytes(request: Request, limits: Limits = LIMITS) -> bytes:
    """The body of a request, bounded in size and time."""
    body = bytearray()

    async def collect():
        async for piece in request.stream():
            body.extend(piece)
            if len(body) > limits.body_bytes:
                raise _too_large(limits)

    try:
        await asyncio.wait_for(collect(), limits.body_seconds)
    except asyncio.TimeoutError:
        raise ServeError("too_slow", "The request took too long to arrive.") from None
    except ClientDisconnect:  # the client left, or its connection waited too long
        raise ServeError("too_slow", "The request ended early.") from None
    return bytes(body)


class ChunkStream(StreamingResponse):
    """A stream of chunks. A client that stops reading is cut off, and `on_close` runs once the
    response is over, however it ends."""

    def __init__(self, chunks, status: int = 200, on_close=None, limits: Limits = LIMITS):
        super().__init__(chunks, status, headers={"X-Content-Type-Options": "nosniff"})
        self.chunks, self.on_close, self.stall_seconds = chunks, on_close, limits.stall_seconds

    async def __call__(self, scope, receive, send):
        async def impatient_send(message):
            await asyncio.wait_for(send(message), self.stall_seconds)

        # Disconnection is listened for all the time: an aborted request must not wait for its turn.
        sender = asyncio.ensure_future(self.stream_response(impatient_send))
        listener = asyncio.ensure_future(self.listen_for_disconnect(receive))
        try:
            await asyncio.wait({sender, listener}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        except (OSError, asyncio.TimeoutError):
            raise ServeError("too_slow", "The client does not read its answer.") from None
        finally:
            sender.cancel()
            listener.cancel()
            await asyncio.gather(sender, listener, return_exceptions=True)
            await self.chunks.aclose()
            if self.on_close is not None:
                self.on_close()


def build_app(token: str | None, lifespan=None, limits: Limits = LIMITS) -> FastAPI:
    """An application without pages of documentation, behind the gate."""
    app = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.add_middleware(Gate, token=token, limits=limits)

    @app.exception_handler(HTTPException)
    async def unknown_path(request: Request, error: HTTPException):
        if error.status_code == 405:
            return refusal(ServeError("wrong_method", "Only POST is understood."), request.scope)
        return refusal(ServeError("unknown_endpoint", "There is nothing here."), request.scope)

    return app


def serve(app, host: str, port: int) -> None:
    """Runs until SIGINT or SIGTERM; answers in progress get `GRACE_SECONDS`. Raises ValueError as
    `check_place`."""
    check_place(host, port)
    uvicorn.run(app, host=host, port=port, **uvicorn_options(GRACE_SECONDS))


def set_up_logging(log_file: str = "", log_dir: str | None = None) -> None:
    """Logs to stderr and, where `log_dir` is given, to a file in it. No content is ever logged, and
    no full disk or closed pipe stops the service: lines are dropped and counted."""
    log_to_stderr(LINES_PER_MINUTE)
    logging.captureWarnings(True)
    quiet_loggers()
    if log_dir is None:
        protect_standard_streams()
    else:
        from llava import constants
        from llava.utils import build_logger

        constants.LOGDIR = log_dir
        build_logger("llava.serve", log_file, LINES_PER_MINUTE)
