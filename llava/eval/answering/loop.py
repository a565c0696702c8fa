"""The answer loop: questions in, answers out, in batches, with images prepared in the background.

Every benchmark program and the suite run this one loop.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
)
from llava.conversation import conv_templates
from llava.eval.answering.questions import Question, load_image
from llava.eval.files import budgets
from llava.eval.files.answer_lines import Failure
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.reuse import Picture, PrefixCache, pad_left
from llava.pruning import Pruner, trace_pruning

PREPARED_IMAGES = 64  # neighbouring questions are often about one image
BATCHES_AHEAD = 2

#: a question with its pictures, or with the reason why it has none
Prepared = tuple[Question, list[Picture] | Failure]


@dataclass
class AnswerLoop:
    """Answers questions with a loaded model.

    conv_mode:      name of the prompt template
    workers:        threads that decode and prepare images
    max_new_tokens: length at which an answer is cut
    temperature:    0 takes the likeliest token; larger values sample, seeded by question number
    reuse:          what the questions about one image share is computed once; same answers
    skip_bad:       a question that cannot be answered gets a `Failure` and stops nothing
    upright_images: images are turned upright and put on white; published results did neither
    """

    tokenizer: object
    model: object
    image_processor: object
    conv_mode: str
    workers: int = 4
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    reuse: bool = True
    skip_bad: bool = False
    upright_images: bool = False

    #: visual tokens per prompt: entering the decoder, and on average over its layers
    visual_tokens: tuple[float, float] | None = None

    def __post_init__(self):
        if self.conv_mode not in conv_templates:
            names = ", ".join(conv_templates)
            raise ValueError(f"unknown conv mode {self.conv_mode!r}, choose from {names}")
        self.known = PrefixCache(self.model)

    def run(
        self, batches: Iterable[tuple[list[int], list[Question]]], image_folder: str
    ) -> Iterator[tuple[list[int], list[str | Failure]]]:
        """Yields (numbers, answers) of every batch of (numbers, questions), in order.

        Batches are taken a little ahead of their turn. A question fails when its image is missing
        or broken, or when the model refuses it (a prompt that is too long); the others of its batch
        are answered. Raises ValueError naming it, unless failures are to be passed over; the
        batches before it have been yielded by then.
        """
        for numbers, batch in self.prepared(batches, image_folder):
            if self.temperature > 0:
                torch.manual_seed(numbers[0])
            asked = [pair for pair in batch if not isinstance(pair[1], Failure)]
            texts = iter(self.answers(asked))
            yield (
                numbers,
                [found if isinstance(found, Failure) else next(texts) for _, found in batch],
            )

    def answers(self, batch: list[tuple[Question, list[Picture]]]) -> list[str | Failure]:
        """Answers to a batch; one that the model refuses is asked one by one, to know for whom."""
        if not batch:
            return []
        try:
            return self.generate(batch)
        except ValueError as error:
            if len(batch) > 1:
                return [answer for pair in batch for answer in self.answers([pair])]
            return [self._failed(f"{batch[0][0]}: {error}", error)]

    def _failed(self, reason: str, error: Exception | None = None) -> Failure:
        """What stands for an answer; raises ValueError where failures are not passed over."""
        if not self.skip_bad:
            raise ValueError(reason) from error
        return Failure(reason)

    def prepared(
        self, batches: Iterable[tuple[list[int], list[Question]]], image_folder: str
    ) -> Iterator[tuple[list[int], list[Prepared]]]:
        """Yields every batch with its pictures, prepared some batches ahead of their use."""
        ahead = deque()
        recent: OrderedDict[str, tuple[Question, Future]] = OrderedDict()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for numbers, questions in batches:
                    pending = []
                    for question in questions:
                        for image in question.images:
                            if image not in recent:
                                place = (question, image, image_folder)
                                recent[image] = question, pool.submit(self.prepare, *place)
                            recent.move_to_end(image)
                        pending.append((question, [recent[image] for image in question.images]))
                    ahead.append((numbers, pending))
                    while len(recent) > PREPARED_IMAGES:
                        recent.popitem(last=False)
                    if len(ahead) > BATCHES_AHEAD:
                        yield self._finished(*ahead.popleft())
                while ahead:
                    yield self._finished(*ahead.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _finished(self, numbers: list[int], pending: list) -> tuple[list[int], list[Prepared]]:
        return numbers, [(question, self._pictures(question, own)) for question, own in pending]

    def _pictures(
        self, question: Question, pending: list[tuple[Question, Future]]
    ) -> list[Picture] | Failure:
        if question.error is not None:
            return self._failed(question.error)
        pictures = []
        for first, future in pending:  # the question that the image was prepared for
            try:
                pictures.append(future.result())
            except ValueError as error:
                reason = str(error).removeprefix(f"{first}: ")
                return self._failed(f"{question}: {reason}", error)
        return pictures

    def prepare(self, question: Question, image: str, image_folder: str) -> Picture:
        """Decodes one image and turns it into pixels as the checkpoint wants them.

        Raises ValueError that names question and image when that cannot be done.
        """
        picture = load_image(question, image, image_folder, not self.upright_images)
        try:
            pixels = process_images([picture], self.image_processor, self.model.image_settings)[0]
        except (ValueError, ArithmeticError) as error:
            name = "in the table" if question.base64 else image
            raise ValueError(f"{question}: image {name}: {error}") from error
        return Picture(pixels, picture.size)

    @torch.inference_mode()
    def generate(self, batch: list[tuple[Question, list[Picture]]]) -> list[str]:
        """Returns the answers to one batch; where a method prunes, the questions' `metadata` says
        what was kept."""
        ids = [
            tokenizer_image_token(self.prompt(question), self.tokenizer, return_tensors="pt")
            for question, _ in batch
        ]
        pruned = self.model.pruner.name != Pruner.name
        if (pruned or self.visual_tokens is None) and any(pictures for _, pictures in batch):
            with trace_pruning(self.model) as trace:
                output = self._generate(ids, batch)
            self.visual_tokens = self.visual_tokens or count_visual_tokens(trace)
            if pruned:
                note_visual_tokens(batch, trace)
        else:
            output = self._generate(ids, batch)
        texts = self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _generate(self, ids: list[torch.Tensor], batch) -> torch.Tensor:
        """New tokens of the prompts `ids`."""
        pad_id = self.tokenizer.pad_token_id
        options = {
            "pad_token_id": self.tokenizer.eos_token_id if pad_id is None else pad_id,
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "use_cache": True,
            **self._sampling(),
        }
        if self.reuse:
            pictures, texts = [own for _, own in batch], [question.text for question, _ in batch]
            return self.known.generate(ids, pictures, texts, **options)
        input_ids, mask = pad_left(ids, options["pad_token_id"])
        device = self.model.device
        return self.model.generate(
            input_ids.to(device),
            attention_mask=mask.to(device),
            **options,
            **self._images(batch),
        )

    def prompt(self, question: Question) -> str:
        """Returns the full prompt: image marks and text as one user turn of the template."""
        mark = DEFAULT_IMAGE_TOKEN
        if getattr(self.model.config, "mm_use_im_start_end", False):
            mark = DEFAULT_IM_START_TOKEN + mark + DEFAULT_IM_END_TOKEN
        text = question.text
        if DEFAULT_IMAGE_TOKEN not in text:
            text = (mark + "\n") * len(question.images) + text
        conversation = conv_templates[self.conv_mode].copy()
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()

    def _sampling(self) -> dict:
        if self.temperature > 0:
            return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {"do_sample": False}

    def _images(self, batch: list[tuple[Question, list[Picture]]]) -> dict:
        """All images of the batch in order; stacked when all have the same number of crops."""
        pictures = [picture for _, own in batch for picture in own]
        if not pictures:
            return {"images": None}
        place = {"device": self.model.device, "dtype": self.model.dtype, "non_blocking": True}
        pixels = [picture.pixels for picture in pictures]
        if len({tuple(p.shape) for p in pixels}) == 1:
            images = torch.stack(pixels).to(**place)
        else:
            images = [p.to(**place) for p in pixels]
        return {
            "images": images,
            "image_sizes": [picture.size for picture in pictures],
            "questions": [question.text for question, own in batch for _ in own],
        }


def note_visual_tokens(batch: list[tuple[Question, list[Picture]]], trace) -> None:
    """Writes into the metadata of every question with images how many of their tokens its prompt
    had per layer, on average, and in the last one, and how many there are without pruning."""
    layers = torch.stack(trace.visual_tokens)[:, :: len(trace.visual_tokens[0]) // len(batch)]
    means, last = layers.float().mean(dim=0).tolist(), layers[-1].tolist()
    lengths = iter(trace.unpruned_lengths)
    for (question, pictures), mean, at_end in zip(batch, means, last, strict=True):
        unpruned = sum(next(lengths) for _ in pictures)
        if pictures:
            question.metadata = {
                budgets.PER_LAYER: round(mean, 2),
                budgets.AT_END: at_end,
                budgets.ALL: unpruned,
            }


def count_visual_tokens(trace) -> tuple[float, float] | None:
    """Returns visual tokens per prompt entering layer 0 and on average over layers, or None."""
    if not trace.visual_tokens:
        return None
    layers = [tokens.float().mean().item() for tokens in trace.visual_tokens]
    return layers[0], sum(layers) / len(layers)
