"""Connections of strangers: none can be held open to keep others out.

A connection on which nothing is being answered waits: for the head of its first request, for the
next one, for a body, or for the rest of one that nobody wants any more. Those that wait are few,
each for a short time; when there are too many, one that had an answer before goes, or else the one
that waits longest. A body that arrives in good pieces counts as news: the slowest sender waits
longest. Used by all three services.
"""

from __future__ import annotations

import logging

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 512  # open at once, those that wait included; more are refused with 503
WAITING = 128  # of them
HEADER_BYTES = 2**15
HEADER_LINES = 128
HEAD_SECONDS = 10.0  # until the request line and the headers have arrived
BODY_SECONDS = 10.0  # that a body may pause
BODY_PIECE = 2**14  # bytes of a body after which its connection waits anew
LINGER_SECONDS = 3.0  # that the rest of a body is read, so that its sender sees the refusal
STALL_SECONDS = 60.0  # that a client may leave its answer unread
KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, so that none is closed in use


class Lobby:
    """The connections of one server that wait, the longest wait first.

    Those that had an answer give way to those that had none: in a burst of refused requests, one
    that has just arrived, and was not read yet, would be the one that waits longest.
    """

    def __init__(self, places: int = WAITING):
        self.places = places
        self._waiting: dict[ImpatientProtocol, bool] = {}  # -> whether it had an answer

    def enter(self, connection: ImpatientProtocol, answered: bool = False) -> None:
        self._waiting[connection] = answered
        while len(self._waiting) > self.places:
            had_answers = (one for one, had_one in self._waiting.items() if had_one)
            first = next(had_answers, None) or next(iter(self._waiting))
            self.leave(first)
            first.hang_up()

    def leave(self, connection: ImpatientProtocol) -> None:
        self._waiting.pop(connection, None)


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 with a limit on every wait. Web sockets are not spoken: their requests are GETs."""

    head_seconds, body_seconds, linger_seconds = HEAD_SECONDS, BODY_SECONDS, LINGER_SECONDS
    stall_seconds, places = STALL_SECONDS, WAITING
    _deadline = _stall = _awaited = None
    _piece = 0  # bytes of a body since the connection took its place in the lobby

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._lobby = vars(self.server_state).setdefault("lobby", Lobby(self.places))
        self._wait("head", self.head_seconds)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE and _too_long(self.conn.trailing_data[0] + data):
            self._refuse_head()
            return
        super().data_received(data)
        self._look(len(data))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def _look(self, received: int = 0) -> None:
        """Notes whether this connection waits now, and until when.

        received: bytes that came just now
        """
        sending = self.conn.their_state is h11.SEND_BODY
        if self._is_answering():
            if sending:
                self._wait_for_body(received)
            else:
                self._lobby.leave(self)
                self._forget_deadline()
        elif not self.transport.is_closing():
            if sending:
                self._wait("end of a body", self.linger_seconds)
            elif self.timeout_keep_alive_task is None or self.conn.trailing_data[0]:
                self._wait("head", self.head_seconds)
            else:
                self._enter_lobby()  # between two requests, for as long as uvicorn says

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self, awaited: str, seconds: float) -> None:
        if self._awaited != awaited:
            self._forget_deadline()
            self._awaited = awaited
            self._deadline = self.loop.call_later(seconds, self._time_is_up)
        self._enter_lobby()

    def _wait_for_body(self, received: int) -> None:
        """The time starts again with every byte, the place in the lobby only with a good piece."""
        self._piece += received
        if self._awaited != "body" or self._piece >= BODY_PIECE:
            self._piece = 0
            self._lobby.leave(self)
        self._forget_deadline()
        self._wait("body", self.body_seconds)

    def _time_is_up(self) -> None:
        if self._awaited == "body" and self.flow.read_paused:
            self._wait_for_body(0)  # it is us who does not read on
        else:
            self.hang_up()

    def _enter_lobby(self) -> None:
        answered = self.cycle is not None and self.cycle.response_complete
        self._lobby.enter(self, answered)

    def hang_up(self) -> None:
        """Closes; what the other side has not read by now is lost."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def _refuse_head(self) -> None:
        self.send_400_response("The head of the request is too long.")

    def _should_upgrade(self) -> bool:
        return False

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_stall()

    def connection_lost(self, exc) -> None:
        self._lobby.leave(self)
        self._forget_deadline()
        self._forget_stall()
        super().connection_lost(exc)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = self._awaited = None

    def _forget_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None


def _too_long(data: bytes) -> bool:
    """Whether the head of a request, as far as it is here, is longer than accepted."""
    head = data.partition(b"\r\n\r\n")[0]
    return len(head) > HEADER_BYTES or head.count(b"\n") > HEADER_LINES


def uvicorn_options(grace_seconds: int) -> dict:
    """Settings of a `uvicorn.Config` that all services share.

    grace_seconds: that answers in progress have when the service is stopped
    """
    return dict(
        log_config=None,  # its lines go where those of the service go
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=HEADER_BYTES,
        http=ImpatientProtocol,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=grace_seconds,
    )


def quiet_loggers() -> None:
    """Keeps libraries from logging what visitors send: addresses, parts of forms."""
    for name in ("httpx", "httpcore", "python_multipart", "multipart", "PIL"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("python_multipart.multipart").setLevel(logging.ERROR)
