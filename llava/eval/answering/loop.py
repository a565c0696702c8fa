"""The answer loop: questions in, answers out, in batches, with images prepared in the background.

Every benchmark program and the suite run this one loop.
"""

import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from llava.eval.answering import kept_masks
from llava.eval.answering.measuring import Meter, end_tokens, new_tokens, operations
from llava.eval.answering.questions import Question, load_image
from llava.eval.files import budgets, costs
from llava.eval.files.answer_lines import Answer, Failure
from llava.front_end import FrontEnd
from llava.model.inputs import Picture
from llava.model.reuse import PrefixCache
from llava.pruning import Pruner, trace_pruning
from llava.pruning.frames import image_frames, shares_of

#: option of methods that keep what boxes cover, as shares of the picture
REFERENCE = "ref_boxes"
PREPARED_IMAGES = 64  # neighbouring questions are often about one image
BATCHES_AHEAD = 2

#: a question with its pictures, or with the reason why it has none
Prepared = tuple[Question, list[Picture] | Failure]


@dataclass
class AnswerLoop:
    """Answers questions with a loaded model.

    front:          the model, and what prepares prompts and images for it
    workers:        threads that decode and prepare images
    max_new_tokens: length at which an answer is cut
    temperature:    0 takes the likeliest token; larger values sample, seeded by question number
    reuse:          what the questions about one image share is computed once; same answers
    skip_bad:       a question that cannot be answered gets a `Failure` and stops nothing
    upright_images: images are turned upright and put on white; published results did neither
    save_masks:     answers say which patches of their images were kept (`Answer.masks`)
    use_ref_masks:  the method keeps what the boxes of a question cover; it has `ref_boxes` for that
    only_masks:     nothing is answered: prompts are read, to see what is kept of them
    measure:        answers say what they cost; measure_memory: memory of a GPU as well
    count_tokens:   answers say how many visual tokens they had also where no method prunes, as
                    images may differ in that; LLaVA's answers files say nothing there
    """

    front: FrontEnd
    workers: int = 4
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    num_beams: int = 1
    reuse: bool = True
    skip_bad: bool = False
    upright_images: bool = False
    save_masks: bool = False
    use_ref_masks: bool = False
    only_masks: bool = False
    measure: bool = False
    measure_memory: bool = False
    count_tokens: bool = False

    #: visual tokens per prompt: entering the decoder, and on average over its layers
    visual_tokens: tuple[float, float] | None = None

    def __post_init__(self):
        self.model = self.front.model
        self.known = PrefixCache(self.model)
        self.meter = Meter(self.model.device, self.measure_memory) if self.measure else None
        if self.use_ref_masks and not hasattr(self.model.pruner, REFERENCE):
            raise ValueError(
                f"reference masks need a pruning method with the option {REFERENCE}, "
                f"{self.model.pruner.name} has none"
            )

    def run(
        self, batches: Iterable[tuple[list[int], list[Question]]], image_folder: str
    ) -> Iterator[tuple[list[int], list[Answer | Failure]]]:
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
            answers = iter(self.answers(asked))
            yield numbers, [own if isinstance(own, Failure) else next(answers) for _, own in batch]

    def answers(self, batch: list[tuple[Question, list[Picture]]]) -> list[Answer | Failure]:
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
        loaded = load_image(question, image, image_folder, not self.upright_images)
        try:
            return self.front.picture(loaded)
        except (ValueError, ArithmeticError) as error:
            name = "in the table" if question.base64 else image
            raise ValueError(f"{question}: image {name}: {error}") from error

    def inputs(self, question: Question, image_folder: str) -> dict:
        """The arguments of `generate` for one question; raises as `prepare` does."""
        pictures = [self.prepare(question, image, image_folder) for image in question.images]
        return self.front.inputs([self.encode(question)], [pictures], [question.text])

    @torch.inference_mode()
    def generate(self, batch: list[tuple[Question, list[Picture]]]) -> list[Answer]:
        """Returns the answers to one batch; where a method prunes, their metadata says what was
        kept."""
        with self.tracing(batch) as trace:
            if self.meter is None:
                output, cost = self._generate(batch), {}
            else:
                output, cost = self.meter(lambda: self._generate(batch), len(batch))
        metadata, found = self.seen(batch, trace)
        if self.meter is not None:
            counts = new_tokens(output, end_tokens(self.model))
            rows = zip(metadata, self.unpruned_tokens(batch, trace), counts, strict=True)
            for row, (own, unpruned, count) in enumerate(rows):
                own |= cost | self.cost(trace, row, unpruned, count)
        texts = [""] * len(batch) if self.only_masks else self.front.decode(output)
        return list(map(Answer, texts, metadata, found))

    def tracing(self, batch: list[tuple[Question, list[Picture]]]):
        """A block in which the model takes notes, where something has to be said of this batch that
        they are needed for; else of None."""
        sees = any(pictures for _, pictures in batch)
        wanted = self.counts_tokens or self.visual_tokens is None or self.measure
        return (
            trace_pruning(self.model) if sees and (wanted or self.shows(batch)) else nullcontext()
        )

    @property
    def counts_tokens(self) -> bool:
        """Whether answers say how many visual tokens they had."""
        return self.count_tokens or self.model.pruner.name != Pruner.name

    def shows(self, batch: list[tuple[Question, list[Picture]]]) -> bool:
        """Whether answers of a batch say which patches were kept."""
        return self.save_masks or any(question.boxes for question, _ in batch)

    def seen(self, batch: list[tuple[Question, list[Picture]]], trace) -> tuple[list, list]:
        """(metadata, masks) of every answer of a batch: what its trace, if it has one, says."""
        metadata: list[dict] = [{} for _ in batch]
        found: list[tuple | None] = [None for _ in batch]
        if trace is not None:
            self.visual_tokens = self.visual_tokens or count_visual_tokens(trace)
            shows = self.shows(batch)
            if self.counts_tokens or shows:
                metadata = kept_tokens([len(pictures) for _, pictures in batch], trace)
            if shows:
                found = self.masks(batch, trace)
        for own, masks in zip(metadata, found, strict=True):
            own |= kept_masks.metadata(masks)
        return metadata, found

    def masks(self, batch: list[tuple[Question, list[Picture]]], trace) -> list[tuple | None]:
        """What was kept of the images of each prompt of a traced batch."""
        prompts = [self.encode(question) for question, _ in batch]
        pictures, boxes = [own for _, own in batch], [question.boxes for question, _ in batch]
        found = kept_masks.kept_masks(trace, prompts, pictures, boxes, self.model)
        for (question, _), masks in zip(batch, found, strict=True):
            if question.boxes and any(mask.reference is None for mask in masks or ()):
                print(
                    f"warning: {question}: a box lies beside what the model sees of its image, and "
                    "is not compared with what was kept",
                    file=sys.stderr,
                )
        return found

    @staticmethod
    def unpruned_tokens(batch: list[tuple[Question, list[Picture]]], trace) -> list[int]:
        """Tokens that the images of each question have without a method."""
        lengths = iter(() if trace is None else trace.unpruned_lengths)
        return [sum(next(lengths) for _ in pictures) for _, pictures in batch]

    def cost(self, trace, row: int, unpruned: int, count: int) -> dict:
        """What an answer of `count` tokens cost beside time and memory, as metadata.

        row: of its batch; unpruned: as `unpruned_tokens` has it
        """
        found: dict = {costs.NEW_TOKENS: count}
        if trace is not None and trace.prompt_tokens:
            found[costs.FLOPS] = operations(trace, row * self.num_beams, count, unpruned)
        return found

    def _generate(self, batch: list[tuple[Question, list[Picture]]]) -> torch.Tensor:
        """New tokens of a batch, (B, n)."""
        asked, options = self.request(batch)
        if self.reuse:
            pad_id = self.front.pad_id
            return self.known.generate(*asked, pad_token_id=pad_id, **options)
        return self.model.generate(**self.front.inputs(*asked), **options)

    def request(self, batch: list[tuple[Question, list[Picture]]]) -> tuple[tuple, dict]:
        """(prompts, pictures and texts of a batch, keywords of `generate`)."""
        prompts = [self.encode(question) for question, _ in batch]
        pictures, texts = [own for _, own in batch], [question.text for question, _ in batch]
        length = 1 if self.only_masks else self.max_new_tokens
        options = {"max_new_tokens": length, "num_beams": self.num_beams}
        options |= {"do_sample": False, "use_cache": True}
        if self.temperature > 0:
            options |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        if self.use_ref_masks:
            options[REFERENCE] = [shares for pair in batch for shares in self.references(*pair)]
        return (prompts, pictures, texts), options

    def references(self, question: Question, pictures: list[Picture]) -> list[list[list[float]]]:
        """The boxes of each image of a question as shares of what the tower sees of it."""
        if question.boxes is None:
            raise ValueError("no boxes are known for its images, which reference masks are made of")
        frames = [image_frames(picture.size, self.model) for picture in pictures]
        if any(len(own) > 1 for own in frames):
            raise ValueError("reference masks are for images in one crop, this model makes several")
        pairs = zip(question.boxes, frames, strict=True)
        found = [shares_of(boxes, frame) for boxes, (frame,) in pairs]
        if any(boxes and not shares for boxes, shares in zip(question.boxes, found, strict=True)):
            raise ValueError("a box lies beside its image; reference masks are made of boxes")
        return found

    def encode(self, question: Question) -> torch.Tensor:
        """(L,) ids of the prompt that asks a question."""
        return self.front.encode(self.front.prompt(question.text, len(question.images)))


def kept_tokens(num_images: list[int], trace) -> list[dict]:
    """Per prompt with images how many of their tokens it had per layer, on average, and in the last
    one, and how many there are without pruning; nothing for a prompt without.

    num_images: of every prompt
    """
    layers = torch.stack(trace.visual_tokens)[:, :: len(trace.visual_tokens[0]) // len(num_images)]
    means, last = layers.float().mean(dim=0).tolist(), layers[-1].tolist()
    lengths = iter(trace.unpruned_lengths)
    found = []
    for count, mean, at_end in zip(num_images, means, last, strict=True):
        unpruned = sum(next(lengths) for _ in range(count))
        kept = {budgets.PER_LAYER: round(mean, 2), budgets.AT_END: at_end, budgets.ALL: unpruned}
        found.append(kept if count else {})
    return found


def count_visual_tokens(trace) -> tuple[float, float] | None:
    """Returns visual tokens per prompt entering layer 0 and on average over layers, or None."""
    if not trace.visual_tokens:
        return None
    layers = [tokens.float().mean().item() for tokens in trace.visual_tokens]
    return layers[0], sum(layers) / len(layers)
