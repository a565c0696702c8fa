"""Failures as sentences a user can act on. They name a cause and a request, never an address."""

from __future__ import annotations

import re

CAUSE = re.compile(r"[a-z_]{1,40}")
#: cause -> what the page says; {model} is filled in where it is known
SENTENCES = {
    "no_controller": "The demo's controller does not answer. Start it or wait until it is back, "
    "then reload this page or press Regenerate.",
    "no_worker": "No worker serves {model} right now. Start one or choose another model, then "
    "press Regenerate.",
    "worker_lost": "The worker stopped while it was answering. Press Regenerate: the request then "
    "goes to another worker, if there is one.",
    "worker_silent": "The worker took too long to answer. Try again, or ask for fewer tokens.",
    "worker_reply": "The worker sent something that is not an answer. It may be of another version "
    "than this page.",
    "busy": "All workers are busy and their queues are full. Wait a moment, then press Regenerate.",
    "not_allowed": "The worker does not accept requests of this page: both must be started with "
    "the same token.",
    "too_large": "The request is larger than the worker accepts. Use a smaller image or a shorter "
    "question.",
    "refused": "The worker refused the request: something in it is outside of what it accepts. "
    "Check the parameters and the method's options.",
    "worker_error": "The worker failed on this request. Press Regenerate; if it happens again, try "
    "another image or method.",
    "no_model": "There is no model to ask: no worker is registered. Start one, then reload this "
    "page.",
    "no_image": "Choose an image first: an example, or one of your own.",
    "no_question": "Type a question first.",
    "no_moderation": "The moderation service does not answer, so your text was not sent. Try again "
    "in a while.",
    "bad_image": "This file is not an image that can be used (PNG, JPEG, WebP, GIF or BMP).",
    "bad_option": "A method option is not valid.",
    "bad_budgets": "The budgets are not valid.",
    "no_link": "The link names something that this page does not have.",
    "no_method": "This pruning method is not available for {model}.",
    "page_error": "The page failed on this request. The log of the page says more under the "
    "request's number.",
}

#: HTTP status of a worker that refused -> cause
REFUSALS = {401: "not_allowed", 403: "not_allowed", 413: "too_large", 429: "busy", 503: "busy"}


class Failure(Exception):
    """A request that cannot be answered.

    cause:   key of `SENTENCES`, or a cause that a worker named
    details: a sentence that replaces the general one
    code:    error code of a worker's chunk, or HTTP status
    model:   name of the model that was asked
    """

    def __init__(self, cause: str, details: str = "", code: int | None = None, model: str = ""):
        self.cause = cause if CAUSE.fullmatch(cause) else "worker_error"
        self.code = code
        general = SENTENCES.get(self.cause, SENTENCES["worker_error"])
        self.sentence = details or general.format(model=model or "this model")
        super().__init__(self.sentence)

    def text(self, request: str) -> str:
        """The sentence with error code, cause and request id, as the chat shows it."""
        code = "" if self.code is None else f" (error_code: {self.code})"
        return f"{self.sentence}{code} [{self.cause}, request {request}]"


def refusal(status: int, chunk: dict) -> Failure:
    """The failure behind an HTTP status of a worker other than 200; `chunk` is its body."""
    general = REFUSALS.get(status, "refused" if status < 500 else "worker_error")
    cause, text = chunk.get("cause"), chunk.get("text")
    return Failure(
        cause if isinstance(cause, str) else general,
        text if isinstance(text, str) else "",
        code=chunk.get("error_code") if isinstance(chunk.get("error_code"), int) else status,
    )
