"""One question with one setting, for the tabs that ask the same question several times."""

from __future__ import annotations

import html
import logging
from collections.abc import AsyncIterator, Callable

from PIL import Image

from llava.conversation import Conversation
from llava.log_output import error_places

from ..errors import new_request_id
from . import asking
from .client import Service
from .exports import Asked
from .failures import Failure
from .report import Report

logger = logging.getLogger("llava.serve.web")
WAITING = "<p class='pv-empty'>The answer appears here.</p>"
NEXT = "<p class='pv-empty'>Waiting …</p>"


class Run:
    """
    text:    the answer so far
    problem: why there is none, "" as long as nothing failed
    ended:   nothing is written any more
    stopped: ... because the visitor stopped it
    left:    Stop was pressed: nothing is asked, measured or shown any more
    """

    def __init__(self):
        self.text, self.problem = "", ""
        self.ended = self.stopped = self.left = False
        self.report: Report | None = None
        self.settings: asking.Settings | None = None
        self.conversation: Conversation | None = None

    async def ask(
        self, service: Service, settings: Callable[[], asking.Settings], text: str, image
    ) -> AsyncIterator[None]:
        """Yields after every piece of the answer. What fails goes into `problem`; `settings` may
        raise Failure."""
        number = new_request_id()
        try:
            self.settings = settings()
            self.conversation = asking.new_conversation(self.settings)
            asking.add_question(self.conversation, text, image, self.settings.mode)
            async for answer in asking.ask(
                service, self.conversation, self.settings, number, self._wanted
            ):
                self.text, self.report = answer.text, answer.report
                yield
        except Failure as failure:
            logger.warning("request %s: %s", number, failure.cause)
            self.problem = failure.text(number)
        except Exception as error:
            logger.error("request %s: %s", number, error_places(error))
            self.problem = Failure("page_error").text(number)
        self.ended = True

    def stop(self) -> None:
        """What was written so far stays."""
        self.left = True
        if not self.ended:
            self.ended = self.stopped = True

    async def dense_seconds(self, service: Service) -> float | None:
        """Measures the prefill of its prompt without pruning."""
        return await asking.dense_seconds(
            service, self.conversation, self.settings, new_request_id(), self._wanted
        )

    def _wanted(self) -> bool:
        return not self.left

    @property
    def method(self) -> str:
        pruning = self.settings and self.settings.pruning
        return pruning["method"] if pruning else ""

    @property
    def images(self) -> list[Image.Image]:
        return self.conversation.get_images(return_pil=True)

    def answer(self) -> str:
        """What is to be read now: the answer so far, or what went wrong."""
        if self.problem:
            return f"⚠️ {self.problem}"
        if self.stopped:
            return f"{self.text} (stopped)".strip()
        return (self.text or "(no text)") if self.ended else f"{self.text}▌"

    def asked(self, example: int | None) -> Asked:
        question = asking.latest_question(self.conversation)
        return Asked(self.settings.model, question, self.text, self.settings.pruning, example)


def said(title: str, text: str) -> str:
    """A box with an answer."""
    return (
        f"<div class='pv-answer'><div class='pv-title pv-method'>{html.escape(title)}</div>"
        f"{html.escape(text.strip())}</div>"
    )
