"""One server: JSON there, JSON or a stream of events back, over plain HTTP.

Requests follow no redirect and use no proxy of the environment. A stream that is closed before its
end closes the connection, which is how vLLM learns that nobody waits for the answer any more.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import urlsplit

from ..network import allowed_place, is_loopback

CONNECT_SECONDS = 5.0
IDLE_SECONDS = 2.0  # after which a connection is not used again; vLLM closes it after 5
ASK_SECONDS = 0.2  # between two looks at whether an answer is still wanted
LONGEST_LINE = 1 << 22  # bytes of one event
GONE = "went away in the middle of an answer"
PORTS = {"http": 80, "https": 443}


class EngineError(ConnectionError):
    """The server is away, went away in the middle of an answer, or sends what is no answer."""


class RefusedError(ValueError):
    """The server refuses a request. status: of HTTP; reason: its words"""

    def __init__(self, url: str, status: int, reason: str):
        super().__init__(f"{url} refuses with status {status}: {reason}")
        self.status, self.reason = status, reason


def hang_up(sock: socket.socket) -> None:
    """Ends a connection for the thread, too, that waits for something to come."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class Watch:
    """Asks from a thread of its own, while its block runs, whether an answer is still wanted; if it
    is not, ends the connection on which the answer comes. ended: whether it did"""

    def __init__(self, should_stop: Callable[[], bool]):
        self.should_stop, self.ended = should_stop, False
        self.sock: socket.socket | None = None
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._finished.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._finished.wait(ASK_SECONDS):
            self.ended = self.ended or self.should_stop()
            if self.ended and self.sock is not None:
                return hang_up(self.sock)


class Server:
    """
    url:     http://HOST:PORT; a `/v1` at its end is taken off
    allowed: HOST or HOST:PORT of servers beyond this machine
    key:     sent as a bearer token
    seconds: longest silence. A server that has much to do is silent until an answer's turn comes
    """

    def __init__(
        self, url: str, allowed: Iterable[str] = (), key: str | None = None, seconds: float = 600.0
    ):
        self.scheme, self.host, self.port = place_of(url)
        places = {allowed_place(text, "--allow-engine") for text in allowed}
        listed = not places.isdisjoint([(self.host, self.port), (self.host, None)])
        if not listed and not is_loopback(self.host):
            raise ValueError(
                f"{url} is not on this machine: prompts are sent there only where that is wanted, "
                f"with --allow-engine {self.host}:{self.port}"
            )
        self.key, self.seconds = key, seconds
        self._idle: list[tuple[float, HTTPConnection]] = []  # since when
        self._busy: set[socket.socket] = set()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    def get(self, path: str) -> dict:
        """What is at a path. Raises EngineError, RefusedError."""
        with self._answer("GET", path, None) as response:
            return self._object(self._all(response))

    def post(self, path: str, body: dict) -> dict:
        """The answer to a request. Raises EngineError, RefusedError."""
        with self._answer("POST", path, body) as response:
            return self._object(self._all(response))

    @contextmanager
    def events(self, path: str, body: dict, watch: Watch | None = None) -> Iterator[Iterator[dict]]:
        """The events of an answer as they come. Leaving the block, and `watch`, end the answer; for
        those inside it then breaks off. Raises as `post` does."""
        with self._answer("POST", path, body | {"stream": True}, watch) as response:
            yield self._events(response)

    @contextmanager
    def _answer(
        self, method: str, path: str, body: dict | None, watch: Watch | None = None
    ) -> Iterator[HTTPResponse]:
        """A response with its body unread. The connection is kept for the next request when that
        was read to its end."""
        connection = self._send(method, path, body)
        sock = connection.sock
        if watch is not None:
            watch.sock = sock
        try:
            with self._lock:
                self._busy.add(sock)
            with self._reading():
                response = connection.getresponse()
            if response.status != 200:
                raise self._refused(response.status, reason_of(self._all(response)))
            yield response
        except BaseException:
            connection.close()
            raise
        finally:
            with self._lock:
                self._busy.discard(sock)
        if response.isclosed() and not response.will_close:
            with self._lock:
                self._idle.append((time.monotonic(), connection))
        else:
            connection.close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What goes wrong inside as an EngineError."""
        try:
            yield
        except TimeoutError as error:
            raise EngineError(f"{self.url} was silent for {self.seconds:g} s") from error
        except (OSError, HTTPException) as error:
            raise EngineError(f"{self.url} {GONE} ({first_words(error)})") from error

    def _refused(self, status: int, reason: str) -> EngineError | RefusedError:
        """What a status other than 200 is: the request's fault, or that of the server."""
        if status < 500:
            return RefusedError(self.url, status, reason)
        return EngineError(f"{self.url} failed with status {status}: {reason}")

    def _all(self, response: HTTPResponse) -> bytes:
        with self._reading():
            return response.read()

    def _send(self, method: str, path: str, body: dict | None) -> HTTPConnection:
        """A connection over which the request has gone out."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        if (connection := self._idle_connection()) is not None:
            try:
                connection.request(method, path, body=data, headers=headers)
                return connection
            except OSError:  # closed by the server meanwhile
                connection.close()
        kind = HTTPSConnection if self.scheme == "https" else HTTPConnection
        connection = kind(self.host, self.port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
            connection.sock.settimeout(self.seconds)
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.request(method, path, body=data, headers=headers)
        except OSError as error:
            connection.close()
            raise EngineError(
                f"no server answers at {self.url} ({first_words(error)}): is it running?"
            ) from error
        return connection

    def _idle_connection(self) -> HTTPConnection | None:
        """One that was used a moment ago: servers close those that are idle for some seconds."""
        latest = time.monotonic() - IDLE_SECONDS
        with self._lock:
            fresh = [entry for entry in self._idle if entry[0] > latest]
            old = [connection for since, connection in self._idle if since <= latest]
            found = fresh.pop()[1] if fresh else None
            self._idle = fresh
        for connection in old:
            connection.close()
        return found

    def _object(self, data: bytes) -> dict:
        with suppress(ValueError, RecursionError):
            if isinstance(value := json.loads(data), dict):
                return value
        raise EngineError(f"{self.url} sends what is no answer of vLLM: {data[:100]!r}")

    def _events(self, response: HTTPResponse) -> Iterator[dict]:
        """The JSON objects of a stream up to `[DONE]`. Raises EngineError where it ends before."""
        while True:
            with self._reading():
                line = response.readline(LONGEST_LINE)
            if not line:
                raise EngineError(f"{self.url} {GONE}")
            if not line.startswith(b"data:"):  # blank lines and comments that keep it alive
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                self._all(response)
                return
            event = self._object(data)
            if error := event.get("error"):
                code = error.get("code") if isinstance(error, dict) else None
                raise self._refused(code if type(code) is int else 500, words_of(error))
            yield event

    def abort(self) -> None:
        """Ends all answers that are under way; who waits for one gets an EngineError."""
        with self._lock:
            for sock in self._busy:
                hang_up(sock)

    def close(self) -> None:
        """Ends the connections that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.close()


def place_of(url: str) -> tuple[str, str, int]:
    """(scheme, host, port) of an address. Raises ValueError when it has other parts."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = parts = None
    plain = parts is not None and parts.path in ("", "/", "/v1", "/v1/")
    if not host or not plain or parts.scheme not in PORTS or any(mark in url for mark in "?#@\\"):
        raise ValueError(f"{url!r} must have the form http://HOST:PORT")
    return parts.scheme, host, port or PORTS[parts.scheme]


def reason_of(data: bytes) -> str:
    """The words of a refusal."""
    with suppress(ValueError, RecursionError):
        value = json.loads(data)
        if isinstance(value, dict):
            return words_of(value.get("error", value))
    return data[:300].decode("utf-8", "replace")


def words_of(error) -> str:
    """The message in an error of vLLM."""
    found = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(found).split())[:300]


def first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:100] or type(error).__name__
