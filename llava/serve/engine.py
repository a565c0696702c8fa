"""Answers requests with one loaded model: checks and prepares them, generates, reports.

Everything here but `Engine.stream` runs in threads; the model is shared as `turns` describes. Where
its language model is in a server (`--engine`), a request has a turn for its images and its method
alone: answers come from the server side by side.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..constants import DEFAULT_IMAGE_TOKEN
from ..conv_mode import choose_conv_mode
from ..engine.server import EngineError, RefusedError
from ..front_end import FrontEnd
from ..model.context import PromptTooLong, position_limit
from ..pruning import Pruner
from .answer_text import AnswerStreamer, without_begun
from .dialogue import last_question
from .errors import ServeError, encode_chunk, server_gone, server_refused
from .images import decode_images
from .limits import LIMITS, Limits
from .methods import MethodShelf, offer, settings, unavailable
from .outbox import Aborted, Outbox
from .protocol import GenerateRequest
from .report import image_geometry, placement, pruning_report
from .service import internal_error, log_failure
from .turns import Seat, Turns

TOO_LONG = "Exceeds max token length. Please start a new conversation, thanks."
LEAST_TEMPERATURE = 0.001  # below, the likeliest token is taken
KEEP_ALIVE_SECONDS = 5.0  # clients give up on a stream that is silent for 10 s
PREPARERS = 2  # requests whose images are decoded at the same time

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """A request that was checked and is ready to run.

    ids:            (L,) ids of the prompt, -200 for an image
    inputs:         the arguments of `generate` that carry prompt and images
    max_new_tokens: 0 or less when the prompt leaves no room
    """

    request: GenerateRequest
    request_id: str
    seat: Seat
    ids: Tensor
    inputs: dict
    max_new_tokens: int
    geometry: list[dict] = field(default_factory=list)
    place: dict = field(default_factory=dict)


class Engine:
    """One model and everything it needs to answer.

    model_name:  what clients call it
    concurrency: requests that are answered at the same time
    folders:     method -> folder of its trained part, for requests that name the method
    checkpoint:  the checkpoint's own name, which may decide on the prompt template; None: clients
                 call it by that name
    """

    def __init__(
        self,
        tokenizer,
        model,
        image_processor,
        model_name: str,
        concurrency: int = 5,
        limits: Limits = LIMITS,
        folders: dict[str, str] | None = None,
        checkpoint: str | None = None,
    ):
        self.model, self.model_name, self.limits = model, model_name, limits
        self.conv_mode = choose_conv_mode(model.config, checkpoint or model_name)
        self.front = FrontEnd(tokenizer, model, image_processor, self.conv_mode.name)
        self.shelf = MethodShelf(model.pruner, folders)
        self.methods = offer(model, self.shelf)
        self.turns = Turns(model)
        self._answering = ThreadPoolExecutor(concurrency, "answer")
        self._preparing = ThreadPoolExecutor(PREPARERS, "prepare")

    def status(self) -> dict:
        """What the worker's status says beyond the published protocol."""
        default = self.shelf.default
        return {
            "pruning_methods": self.methods,
            "default_pruning": {"method": default.name, "options": settings(default)},
            "num_patches": self._patches(),
            "context_length": self._context_length(),
            "conv_mode": self.conv_mode.name,
        }

    def _patches(self) -> int | None:
        """Patches of a crop; None where every image has its own number."""
        tower = self.model.get_vision_tower()
        return None if tower.grid is None else tower.num_patches

    def _context_length(self) -> int:
        return position_limit(self.model.config) or 2048

    async def prepare(self, request: GenerateRequest, request_id: str) -> Job:
        """Checks everything that can be wrong with a request. Raises ServeError."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._preparing, self._prepare, request, request_id)
        except Exception as error:
            raise failure(error, request_id) from None

    def _prepare(self, request: GenerateRequest, request_id: str) -> Job:
        texts = request.images or []
        if request.model not in (None, self.model_name):
            raise ServeError("unknown_model", "This worker serves another model.")
        marks = request.prompt.count(DEFAULT_IMAGE_TOKEN) if texts else 0
        if marks != len(texts):
            raise ServeError(
                "image_count",
                f"Number of images ({len(texts)}) does not match number of {DEFAULT_IMAGE_TOKEN} "
                f"tokens in the prompt ({marks}).",
            )
        if not texts and DEFAULT_IMAGE_TOKEN in request.prompt:
            raise ServeError(
                "image_count", f"The prompt has an {DEFAULT_IMAGE_TOKEN} token, but no image came."
            )
        if odd := [mark for mark in self.front.reserved if mark in request.prompt]:
            raise ServeError(
                "bad_request",
                f"The prompt holds {odd[0]}, which only this model's tokenizer may write; "
                f"{DEFAULT_IMAGE_TOKEN} says where an image goes.",
            )
        pruner = self.shelf.get(request.pruning)
        images = decode_images(texts, self.limits)
        seat = self.turns.seat(pruner)
        try:
            seat.__enter__()
        except (ValueError, OSError, ImportError) as error:
            raise unavailable(error) from None
        try:
            image_settings = self.model.image_settings  # they depend on the method
        finally:
            seat.__exit__()
        try:
            return self._inputs(request, request_id, seat, images, image_settings)
        except ValueError as error:
            logger.info("request %s: %s", request_id, type(error).__name__)
            raise ServeError("bad_image", "An image cannot be prepared for this model.") from None

    def _inputs(
        self, request: GenerateRequest, request_id: str, seat: Seat, images, image_settings
    ) -> Job:
        """image_settings: of the model while the seat has the turn, which is not needed here"""
        question = request.question
        if question is None and images:
            question = last_question(request.prompt, self.front.conversation())
        ids = self.front.encode(self.front.marked(request.prompt))
        pictures = [self.front.picture(image, image_settings) for image in images]
        inputs = self.front.inputs([ids], [pictures], [question])
        tower = self.model.get_vision_tower()
        geometry = [
            image_geometry(image.size, image_settings, tower, picture.pixels)
            for image, picture in zip(images, pictures, strict=True)
        ]
        # The last token of an answer takes no position, a mark those of its image.
        room = self._context_length() + 1 - (len(ids) - len(pictures))
        if seat.pruner.name == Pruner.name:  # a method leaves fewer: `generate` counts them
            room -= sum(self.model.image_extent(picture.pixels) for picture in pictures)
        most = min(request.max_new_tokens, self.limits.new_tokens, room)
        place = placement(image_settings)
        return Job(request, request_id, seat, ids, inputs, most, geometry, place)

    async def stream(self, job: Job):
        """The chunks of the answer, encoded. Closing the stream ends the work."""
        if job.max_new_tokens < 1:
            yield encode_chunk(too_long(job))
            return
        outbox = Outbox(asyncio.get_running_loop(), self.limits.stall_seconds)
        future = self._answering.submit(self._run, job, outbox)
        latest = job.request.chunk("")
        chunks = outbox.chunks(KEEP_ALIVE_SECONDS)
        try:
            async for chunk in chunks:
                latest = chunk or latest
                yield encode_chunk(latest)
        finally:
            outbox.close()
            future.cancel()
            await chunks.aclose()

    def _run(self, job: Job, outbox: Outbox) -> None:
        """In a thread of its own: the whole answer, or the reason why there is none."""
        with suppress(Aborted):
            try:
                with torch.inference_mode():
                    self._generate(job, outbox)
            except PromptTooLong:
                outbox.put(too_long(job))
            except Exception as error:
                if isinstance(error, Aborted):
                    raise
                outbox.put(failure(error, job.request_id).chunk(job.request_id))
            finally:
                outbox.end()

    def _generate(self, job: Job, outbox: Outbox) -> None:
        """Writes the answer into `outbox`. Raises what `generate` does."""
        model, options = self.model, sampling(job)
        with suppress(Stopped):
            with job.seat:
                writer = Writer(self.front.tokenizer, job, outbox)
                if model.engine is None:
                    options |= {"generation_strategy": model.possible_strategy, "use_cache": True}
                    model.generate(**job.inputs, **options, streamer=writer)
                    return
                prompt = model.engine.encode(model, **job.inputs)
            options |= {"streamer": writer, "should_stop": outbox.is_closed}
            model.engine.generate(model, prompt, **options)

    def close(self) -> None:
        self._answering.shutdown(wait=False, cancel_futures=True)
        self._preparing.shutdown(wait=False, cancel_futures=True)


def sampling(job: Job) -> dict:
    """The arguments of `generate` that choose tokens."""
    request, options = job.request, {"max_new_tokens": job.max_new_tokens}
    if request.temperature <= LEAST_TEMPERATURE or request.top_p == 0:
        return {**options, "do_sample": False}
    chosen = {"temperature": request.temperature, "top_p": request.top_p}
    return {**options, "do_sample": True, **chosen}


class Stopped(Exception):
    """The answer reached its stop text."""


class Writer(AnswerStreamer):
    """Turns new tokens into chunks, and passes the turn at the model on with each of them."""

    def __init__(self, tokenizer, job: Job, outbox: Outbox):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.job, self.outbox = job, outbox
        self.answer, self.new_tokens = "", 0
        self.started, self.prefill_seconds = time.perf_counter(), None

    def put(self, value) -> None:
        if not self.next_tokens_are_prompt:
            self.new_tokens += value.numel()
            if self.prefill_seconds is None:
                self.prefill_seconds = time.perf_counter() - self.started
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.answer += text
        stop = self.job.request.stop
        at = self.answer.find(stop) if stop else -1
        if at >= 0:
            self.answer = self.answer[:at]
        ends = stream_end or at >= 0
        shown = self.answer if ends else without_begun(self.answer, stop)
        chunk = self.job.request.chunk(shown)
        if ends:
            chunk["pruning_report"] = self.report()
        self.job.seat.pass_on(lambda: self.outbox.put(chunk))
        if at >= 0:
            raise Stopped

    def report(self) -> dict:
        job = self.job
        kept = pruning_report(job.seat.pruner, job.seat.trace, job.ids, job.geometry, job.place)
        return {
            **kept,
            "prefill_seconds": self.prefill_seconds,
            "total_seconds": time.perf_counter() - self.started,
            "new_tokens": self.new_tokens,
        }


def too_long(job: Job) -> dict:
    """The chunk that stands for an answer where the prompt leaves no room for one."""
    return job.request.chunk(TOO_LONG) | {"cause": "prompt_too_long"}


def failure(error: Exception, request_id: str) -> ServeError:
    """What the user is told about an error of the model."""
    if isinstance(error, ServeError):
        return error
    log_failure(error, request_id)
    if isinstance(error, EngineError):
        return server_gone()
    if isinstance(error, RefusedError):
        return server_refused(error.status)
    if is_out_of_memory(error):
        if torch.cuda.is_available():
            with suppress(RuntimeError):  # torch refuses while another thread captures a graph
                torch.cuda.empty_cache()
        return ServeError(
            "out_of_memory",
            "The worker ran out of memory. Use a smaller image, a shorter prompt or fewer tokens.",
        )
    return internal_error()


def is_out_of_memory(error: Exception) -> bool:
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    )
