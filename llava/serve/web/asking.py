"""One question to a worker: the dialogue, the body of the request, the stream of the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, conv_templates

from .client import Service
from .failures import Failure
from .report import Report, read_report
from .templates import AUTOMATIC, stop_of, template_of

TEXT_CHARACTERS = 1536  # of a question
TEXT_CHARACTERS_WITH_IMAGE = 1200
MAX_NEW_TOKENS = 1536
UPDATE_SECONDS = 0.05  # shortest time between two updates of the page


@dataclass(frozen=True)
class Settings:
    """What is chosen beside question and image.

    mode:    preprocessing of images that are not square: Crop, Resize, Pad or Default
    pruning: the "pruning" field of the request, None for the worker's default
    conv_mode: the template that the worker says its model has, None where it says nothing
    """

    model: str
    template: str = AUTOMATIC
    mode: str = "Default"
    temperature: float = 0.2
    top_p: float = 0.7
    max_new_tokens: int = 512
    pruning: dict | None = None
    conv_mode: str | None = None


@dataclass(frozen=True)
class Answer:
    """text: answer so far; report: what was kept, with the last piece only."""

    text: str
    report: Report | None = None


def new_conversation(settings: Settings) -> Conversation:
    """An empty dialogue in the template of the chosen model."""
    name = template_of(settings.model, settings.template, settings.conv_mode)
    return conv_templates[name].copy()


def in_template(conversation: Conversation, settings: Settings) -> Conversation:
    """The same dialogue in the template of the model that is asked now, which may be another one
    than before."""
    found = new_conversation(settings)
    for number, (_, message) in enumerate(conversation.messages[conversation.offset :]):
        found.append_message(found.roles[number % 2], message)
    return found


def add_question(
    conversation: Conversation, text: str, image: Image.Image | None = None, mode: str = "Default"
) -> None:
    """Appends the question, cut to the limit, and an open answer. An image comes first of all."""
    limit = TEXT_CHARACTERS if image is None else TEXT_CHARACTERS_WITH_IMAGE
    text = text.replace(DEFAULT_IMAGE_TOKEN, "")[:limit].strip()
    message = text if image is None else (f"{text}\n{DEFAULT_IMAGE_TOKEN}", image, mode)
    conversation.append_message(conversation.roles[0], message)
    conversation.append_message(conversation.roles[1], None)


def request_body(conversation: Conversation, settings: Settings) -> dict:
    """The body of /worker_generate_stream; numbers are brought into their range."""
    body = {
        "model": settings.model,
        "prompt": conversation.get_prompt(),
        "temperature": min(max(float(settings.temperature), 0.0), 1.0),
        "top_p": min(max(float(settings.top_p), 0.0), 1.0),
        "max_new_tokens": min(max(int(settings.max_new_tokens), 1), MAX_NEW_TOKENS),
        "stop": stop_of(conversation),
        "images": conversation.get_images(),
        "question": latest_question(conversation),
    }
    return body if settings.pruning is None else {**body, "pruning": settings.pruning}


def latest_question(conversation: Conversation) -> str:
    """The latest question without marks of images, for methods that read it."""
    message = conversation.messages[-2][1]
    text = message[0] if isinstance(message, tuple) else message
    return text.replace(DEFAULT_IMAGE_TOKEN, "").strip()


async def ask(
    service: Service,
    conversation: Conversation,
    settings: Settings,
    request: str,
    wanted: Callable[[], bool] = lambda: True,
) -> AsyncIterator[Answer]:
    """The growing answer to the open message of `conversation`, written into it as well.

    As soon as it is not `wanted` any more it ends, and the worker is left. Raises Failure.
    """
    if not settings.model:
        raise Failure("no_model")
    body = await asyncio.to_thread(request_body, conversation, settings)
    clock, shown, told, text, report = asyncio.get_running_loop().time, 0.0, "", "", None
    async for chunk in _while(wanted, service.answer(body, request)):
        text = chunk.text[len(body["prompt"]) :].strip()
        report = chunk.report or report
        conversation.messages[-1][1] = text
        # A worker that repeats itself says that it lives: there is nothing to draw.
        if text != told and clock() - shown >= UPDATE_SECONDS:
            shown, told = clock(), text
            yield Answer(text)
    if wanted():
        yield Answer(text, read_report(report))


async def _while(wanted: Callable[[], bool], pieces: AsyncIterator) -> AsyncIterator:
    """The pieces as long as they are wanted; the next one is not waited for after that."""
    async with aclosing(pieces):
        while True:
            piece = asyncio.ensure_future(anext(pieces, None))
            try:
                while not piece.done() and wanted():
                    await asyncio.wait({piece}, timeout=UPDATE_SECONDS)
            finally:
                if not piece.done():
                    piece.cancel()
                    await asyncio.wait({piece})
            if piece.cancelled() or (chunk := piece.result()) is None or not wanted():
                return
            yield chunk


async def dense_seconds(
    service: Service,
    conversation: Conversation,
    settings: Settings,
    request: str,
    wanted: Callable[[], bool] = lambda: True,
) -> float | None:
    """Measures the prefill of the same prompt without pruning; None when that fails, or is not
    `wanted` any more."""
    asked = conversation.copy()
    asked.messages[-1][1] = None
    dense = {"method": "none", "visual_token_num": None, "options": {}}
    plain = replace(settings, max_new_tokens=1, pruning=dense)
    report = None
    try:
        async for answer in ask(service, asked, plain, request, wanted):
            report = answer.report
    except Failure:
        return None
    return report and report.prefill_seconds
