"""The chat: questions about an image, streamed answers, votes, and what the pruning kept."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from functools import partial

import gradio as gr
from PIL import Image

from llava.conversation import Conversation
from llava.image_io import displayed
from llava.log_output import error_places
from llava.pruning import DEFAULT_METHOD
from llava.utils import moderation_msg, violates_moderation

from ..errors import new_request_id
from . import asking
from .client import Service
from .controls import Controls, question_box
from .examples import number_of
from .exports import Asked
from .failures import SENTENCES, Failure
from .insight import EMPTY, NO_IMAGE, insight
from .log import ConversationLog
from .picker import MethodPicker
from .pictures import data_uri
from .report import Report
from .script import AGAIN, SENT

logger = logging.getLogger("llava.serve.web")
CURSOR = "▌"
STOPPED = "*(stopped)*"
THUMBNAIL = 180  # pixels of the longer side of an image in the chat


@dataclass
class Chat:
    """What a visitor's chat remembers.

    image:   the picture the dialogue is about, as it was chosen
    bubbles: the chat window: user and assistant in turn
    started: time of the latest question
    turn:    id of the request whose answer may still be shown, "" once it was stopped or cleared
    """

    conversation: Conversation | None = None
    image: Image.Image | None = None
    bubbles: list[dict] = field(default_factory=list)
    started: float = 0.0
    turn: str = ""
    model: str = ""


class ChatTab:
    """Layout and events of the first tab; call inside the layout.

    moderate: ask OpenAI's moderation service about every text first
    """

    def __init__(self, service: Service, controls: Controls, log: ConversationLog, moderate: bool):
        self.service, self.controls, self.log, self.moderate = service, controls, log, moderate
        self.methods = gr.State({"methods": {}, "dense": None, "own_grids": False})
        self.chat = gr.State(None, time_to_live=4 * 3600)
        with gr.Row(equal_height=False, elem_id="chat-tab"):
            with gr.Column(scale=6, min_width=320):
                self._add_window()
            with gr.Column(scale=5, min_width=320, elem_id="chat-side"):
                self.picker = MethodPicker("chat", self.methods, default=DEFAULT_METHOD)
                self.insight = gr.HTML(EMPTY, elem_id="insight", elem_classes="pv-html")

    def _add_window(self) -> None:
        self.window = gr.Chatbot(
            label="Chat",
            elem_id="chatbot",
            sanitize_html=True,
            layout="bubble",
            buttons=["copy"],
            feedback_options=None,
            allow_tags=False,
            show_label=False,
            placeholder="Choose an example or an image of your own, and ask.",
        )
        with gr.Row(elem_classes="pv-ask"):
            self.text = question_box("question", "Ask about the image and press Enter")
            self.send = gr.Button("Send", variant="primary", scale=1, min_width=70, elem_id="send")
            self.stop = gr.Button(
                "Stop", variant="stop", scale=1, min_width=70, elem_id="stop", visible=False
            )
        with gr.Row(elem_classes="pv-buttons"):
            labels = ("Upvote", "Downvote", "Flag", "Regenerate", "Clear")
            names = ("upvote", "downvote", "flag", "regenerate", "clear")
            self.buttons = [
                gr.Button(label, interactive=False, size="sm", min_width=90, elem_id=name)
                for label, name in zip(labels, names, strict=True)
            ]
        self.votes, (self.again, self.clear) = self.buttons[:3], self.buttons[3:]

    @property
    def outputs(self) -> set:
        shown = {self.chat, self.window, self.text, self.insight, self.send, self.stop}
        return shown | {self.methods, self.picker.budget, *self.buttons}

    def connect(self, concurrency: int) -> None:
        """Wires the events; `concurrency` answers are written at a time."""
        inputs = self.controls.inputs | self.picker.inputs | {self.methods, self.chat, self.text}
        slow = dict(
            inputs=inputs,
            outputs=self.outputs,
            concurrency_limit=concurrency,
            concurrency_id="answers",
            show_progress="hidden",
        )
        quick = dict(show_progress="hidden", concurrency_limit=None)
        asked, shown = [self.send.click, self.text.submit], [self.window]
        gr.on(asked, None, [self.text, self.window], shown, js=SENT, **quick)
        self.again.click(None, [self.window], shown, js=AGAIN, **quick)
        gr.on(asked, self.ask, **slow)
        self.again.click(self.regenerate, **slow)
        # Without `cancels`: gradio would go on until the browser has this handler's updates, show
        # later pieces after them, and may cover the answer with "Error".
        self.stop.click(self.stopped, {self.chat}, self.outputs, **quick)
        clear = [self.clear.click, self.window.clear]
        gr.on(clear, self.cleared, {self.chat}, self.outputs, **quick)
        for button, kind in zip(self.votes, ("upvote", "downvote", "flag"), strict=True):
            button.click(self._voter(kind), {self.chat, self.controls.model}, self.votes, **quick)

    async def ask(self, values: dict, request: gr.Request):
        """Send: the question goes into the dialogue, a new image starts a new one."""
        chat = values[self.chat] or Chat()
        text, image = (values[self.text] or "").strip(), values[self.controls.image]
        if not text:
            gr.Warning(SENTENCES["no_question"])
            yield {self.chat: chat}
        elif refused := self.moderate and await asyncio.to_thread(_refused, text):
            gr.Warning(refused)
            yield {self.chat: chat, self.window: chat.bubbles}
        else:
            add = partial(_add, chat, text=text, image=image)
            async for update in self._turn(chat, values, request, add):
                yield update

    async def regenerate(self, values: dict, request: gr.Request):
        """Asks the latest question again, with the method and parameters chosen now."""
        chat = values[self.chat]
        if chat is None or not chat.bubbles:  # the session was forgotten in the meantime
            gr.Warning(SENTENCES["no_question"])
            yield self.cleared()
        else:
            async for update in self._turn(chat, values, request, partial(_reopen, chat)):
                yield update

    async def _turn(self, chat: Chat, values: dict, request: gr.Request, prepare):
        """Updates of one turn; `prepare(settings)` puts the open question into the dialogue."""
        number = new_request_id()
        try:
            known = values[self.methods]
            pruning = self.picker.request(known["methods"], values)
            settings = self.controls.settings(values, pruning, known.get("conv_mode"))
        except Failure as failure:  # nothing was asked yet: the text stays where it is
            gr.Warning(failure.sentence)
            yield {self.chat: chat, self.window: chat.bubbles}
            return
        chat.started, chat.model, chat.turn = time.time(), settings.model, number
        try:
            prepare(settings)
            async for update in self._answer(chat, settings, values, number):
                yield update
            if chat.turn == number:
                self.log.chat(settings.model, chat.conversation, chat.started, _ip(request))
        except Failure as failure:
            logger.warning("request %s: %s", number, failure.cause)
            yield self._failed(chat, failure.text(number), number)
        except Exception as error:
            # The message of an error may repeat what a visitor typed; its place does not.
            logger.error("request %s: %s", number, error_places(error))
            yield self._failed(chat, Failure("page_error").text(number), number)

    async def _answer(self, chat: Chat, settings: asking.Settings, values: dict, number: str):
        chat.bubbles[-1]["content"] = CURSOR
        yield {**self._busy(), self.chat: chat, self.window: chat.bubbles, self.text: ""}
        question = (self.service, chat.conversation, settings, number, lambda: chat.turn == number)
        async for answer in asking.ask(*question):
            chat.bubbles[-1]["content"] = answer.text + CURSOR
            yield {self.window: chat.bubbles}
        if chat.turn != number:
            yield self._unchanged()
            return
        chat.bubbles[-1]["content"] = answer.text or "*(no text)*"
        yield {**self._ready(), self.window: chat.bubbles}
        images = chat.conversation.get_images(return_pil=True)
        if not images:
            yield {self.insight: NO_IMAGE}
            return
        report = answer.report
        asked = await asyncio.to_thread(self._asked, chat, settings, answer.text)
        measures = bool(report and report.method != "none" and values[self.controls.dense])
        shown = await asyncio.to_thread(insight, images, report, None, measures, asked)
        if chat.turn != number:
            yield self._unchanged()
            return
        yield {self.insight: shown, **self._widen(values, report)}
        if measures:
            dense = await asking.dense_seconds(*question)
            if chat.turn == number:  # else the panel belongs to the next answer already
                shown = await asyncio.to_thread(insight, images, report, dense, asked=asked)
                yield {self.insight: shown}
            else:
                yield self._unchanged()

    def _unchanged(self) -> dict:
        """The last update of a turn whose answer is not wanted any more: gradio sends the last one
        again when the turn is over."""
        return {self.window: gr.skip()}

    def _asked(self, chat: Chat, settings: asking.Settings, answer: str) -> Asked:
        """What the panel's link and downloads say."""
        example = chat.image and number_of(chat.image, self.controls.samples)
        question = asking.latest_question(chat.conversation)
        return Asked(settings.model, question, answer, settings.pruning, example)

    def _widen(self, values: dict, report: Report | None) -> dict:
        """Images of several crops have more patches than one crop: the slider learns of it."""
        known = values[self.methods]
        most = max((image.total for image in report.images), default=0) if report else 0
        if most <= (known["dense"] or 0):
            return {}
        updates = {self.methods: {**known, "dense": most}}
        if not values[self.picker.shares]:
            updates[self.picker.budget] = gr.update(maximum=most)
        return updates

    def _busy(self) -> dict:
        off = {button: gr.update(interactive=False) for button in self.buttons}
        return {**off, self.send: gr.update(visible=False), self.stop: gr.update(visible=True)}

    def _ready(self, votes: bool = True) -> dict:
        on = {button: gr.update(interactive=True) for button in (self.again, self.clear)}
        on |= {button: gr.update(interactive=votes) for button in self.votes}
        return {**on, self.send: gr.update(visible=True), self.stop: gr.update(visible=False)}

    def _failed(self, chat: Chat, sentence: str, number: str) -> dict:
        """The sentence in place of the answer, which stays open for another try."""
        if chat.turn != number:
            return self._unchanged()
        chat.conversation.messages[-1][1] = None
        chat.bubbles[-1] = {"role": "assistant", "content": f"⚠️ {sentence}"}
        return {**self._ready(votes=False), self.chat: chat, self.window: chat.bubbles}

    def stopped(self, values: dict):
        """Stop: what was written so far stays, and can be asked again."""
        chat = values[self.chat]
        if chat is None or not chat.bubbles:
            return self._ready(votes=False)
        chat.turn, shown = "", chat.bubbles[-1]["content"]
        if shown.endswith(CURSOR):  # else it was complete in the meantime
            chat.bubbles[-1]["content"] = f"{shown.removesuffix(CURSOR)} {STOPPED}".strip()
        return {**self._ready(), self.chat: chat, self.window: chat.bubbles}

    def cleared(self, values: dict | None = None):
        """Clear: a new dialogue; image and method stay."""
        if values and values[self.chat]:
            values[self.chat].turn = ""  # what is still written or measured is not shown any more
        off = {button: gr.update(interactive=False) for button in self.buttons}
        return {
            **self._ready(),
            **off,
            self.chat: None,
            self.window: [],
            self.text: "",
            self.insight: EMPTY,
        }

    def _voter(self, kind: str):
        def vote(values: dict, request: gr.Request):
            chat = values[self.chat]
            if chat is not None and chat.conversation is not None:
                self.log.vote(kind, chat.model, chat.conversation, _ip(request))
            return {button: gr.update(interactive=False) for button in self.votes}

        return vote


def _add(chat: Chat, settings: asking.Settings, text: str, image: Image.Image | None) -> None:
    fresh = image is not None and not _same(image, chat.image)
    if fresh or chat.conversation is None:
        chat.conversation, chat.image, chat.bubbles = asking.new_conversation(settings), image, []
    chat.conversation = asking.in_template(chat.conversation, settings)
    messages = chat.conversation.messages
    if messages and not messages[-1][1]:
        del messages[-2:]  # it failed and was given up; the model need not know of it
    first = len(messages) == chat.conversation.offset
    asking.add_question(chat.conversation, text, chat.image if first else None, settings.mode)
    if not chat.bubbles and chat.image is not None:
        picture = f'<img src="{data_uri(chat.image, THUMBNAIL)}" alt="the image asked about">'
        chat.bubbles.append({"role": "user", "content": gr.HTML(picture)})
    chat.bubbles.append({"role": "user", "content": text})
    chat.bubbles.append({"role": "assistant", "content": ""})


def _reopen(chat: Chat, settings: asking.Settings) -> None:
    chat.conversation = asking.in_template(chat.conversation, settings)
    messages = chat.conversation.messages
    messages[-1][1] = None
    if isinstance(messages[-2][1], tuple):
        messages[-2][1] = (*messages[-2][1][:2], settings.mode)
    chat.bubbles[-1] = {"role": "assistant", "content": ""}


def _refused(text: str) -> str:
    """Why a text is not sent, "" when it may be."""
    flagged = violates_moderation(text, on_error=None)
    return SENTENCES["no_moderation"] if flagged is None else moderation_msg if flagged else ""


def _same(image: Image.Image, other: Image.Image | None) -> bool:
    """Whether two pictures look the same: one with a palette has numbers of colours for pixels."""
    if other is None or image.size != other.size:
        return False
    return displayed(image).tobytes() == displayed(other).tobytes()


def _ip(request: gr.Request) -> str:
    return request.client.host if request and request.client else ""
