"""The web server under the page: gradio's, with the limits and the logs of the other services."""

from __future__ import annotations

import logging
import sys
import traceback
from contextlib import contextmanager
from types import SimpleNamespace

from gradio import http_server, queueing, routes, utils

from llava.log_output import error_places

from ..connections import uvicorn_options

CONNECTIONS = 768  # every visitor's page keeps one or two open
GRACE_SECONDS = 3  # that answers in progress have when the page is stopped
CLOSE_SECONDS = GRACE_SECONDS + 2

logger = logging.getLogger("llava.serve.web")


class PageServer(http_server.Server):
    """Replaces gradio's own, which sets no limits."""

    def __init__(self, config, **more):
        options = {**uvicorn_options(GRACE_SECONDS), "limit_concurrency": CONNECTIONS}
        super().__init__(type(config)(config.app, config.host, config.port, **options), **more)
        for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
            uvicorns = logging.getLogger(name)  # `config` has given them handlers of its own
            uvicorns.handlers.clear()
            uvicorns.propagate = True

    def close(self) -> None:
        self.should_exit = True
        self.thread.join(CLOSE_SECONDS)


@contextmanager
def limited_server():
    """Inside of the block, pages are launched with `PageServer`."""
    before, http_server.Server = http_server.Server, PageServer
    try:
        yield
    finally:
        http_server.Server = before


def log_failed_events() -> None:
    """Makes gradio log one line where it prints the traceback of an event that failed: what a
    visitor sent is in the message of such an error."""

    def print_exc(*_, **__) -> None:
        error = sys.exc_info()[1]
        if error is not None:
            logger.warning("an event failed: %s", error_places(error))

    discreet = SimpleNamespace(**{**vars(traceback), "print_exc": print_exc})
    for module in (queueing, routes, utils):
        module.traceback = discreet
