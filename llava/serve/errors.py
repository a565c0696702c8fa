"""Failures of the service: a cause a program can act on and a sentence a person can."""

from __future__ import annotations

import json
import secrets

from llava.errors import how_to_install

#: cause -> (HTTP status, error code of the streaming protocol)
CAUSES = {
    "bad_request": (400, 1),
    "bad_image": (400, 1),
    "image_count": (400, 1),
    "method_unavailable": (400, 1),
    "unauthorized": (401, 1),
    "forbidden": (403, 1),
    "unknown_model": (404, 1),
    "unknown_endpoint": (404, 1),
    "wrong_method": (405, 1),
    "too_slow": (408, 1),
    "too_large": (413, 1),
    "not_json": (415, 1),
    "internal": (500, 1),
    "out_of_memory": (503, 1),
    "busy": (503, 1),
    "no_worker": (503, 2),
    "worker_died": (502, 3),
}
SEPARATOR = b"\0"
NEEDS_EXTRA = f"the service needs the packages of the extra `serve`: {how_to_install('serve')}"


class ServeError(Exception):
    """A request that is refused or failed.

    cause:   key of `CAUSES`
    message: a sentence for the user; no path, address or value of the server may be in it
    """

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause, self.message = cause, message
        self.status, self.error_code = CAUSES[cause]

    def chunk(self, request_id: str) -> dict:
        """The last chunk of a stream, and the body of a refusal."""
        return {
            "text": self.message,
            "error_code": self.error_code,
            "cause": self.cause,
            "request_id": request_id,
        }


def server_gone() -> ServeError:
    """What is said when the model server behind a worker does not answer, or stops to."""
    return ServeError("worker_died", "The model server behind this worker is gone.")


def server_refused(status: int) -> ServeError:
    """What is said when that server answers with an HTTP status other than 200."""
    if status in (429, 503):
        return ServeError("busy", "The model server is busy; try again soon.")
    if status in (400, 413, 422):
        return ServeError(
            "bad_request",
            "The model server refused the request: it may be too long, or a parameter may be none "
            "that it takes.",
        )
    return ServeError("internal", f"The model server failed (status {status}).")


def encode_chunk(chunk: dict) -> bytes:
    """One chunk as it goes over the wire: JSON and a null byte."""
    return json.dumps(chunk).encode() + SEPARATOR


def new_request_id() -> str:
    return secrets.token_hex(4)
