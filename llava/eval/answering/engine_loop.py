"""The answer loop where the language model is in a server: many questions are under way at once.

Images and prompts are prepared and embedded here, batch after batch. The server gets every prompt
when it is ready and answers together what it has, so that no short answer waits for a long one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial

import torch

from llava.eval.answering.loop import AnswerLoop, Prepared
from llava.eval.answering.measuring import end_tokens, new_tokens
from llava.eval.answering.questions import Question
from llava.eval.files.answer_lines import Answer, Failure
from llava.model.inputs import Picture
from llava.model.prompt import Prompt

#: makes an answer, with the server
Making = Callable[[], Answer | Failure]


@dataclass
class EngineLoop(AnswerLoop):
    """
    engine_requests: questions that are under way at the same time
    """

    engine_requests: int = 64

    def __post_init__(self):
        super().__post_init__()
        self.engine = self.model.engine
        self.engine.check_options({"num_beams": self.num_beams})
        if self.measure_memory:
            raise ValueError("the memory of answers is that of the server, which does not tell it")
        if self.engine_requests < 1:
            raise ValueError(f"engine_requests ({self.engine_requests}) must be at least 1")

    def run(self, batches, image_folder: str) -> Iterator[tuple[list[int], list[Answer | Failure]]]:
        """As of other loops, but questions come one by one, as they are answered.

        Raises EngineError where the server goes away; what was answered has been yielded by then.
        """
        under_way: dict[Future, int] = {}
        pool = ThreadPoolExecutor(self.engine_requests, "answer")
        try:
            for numbers, batch in self.prepared(batches, image_folder):
                for number, making in zip(numbers, self.begin(numbers, batch), strict=True):
                    under_way[pool.submit(making)] = number
                yield from self._answered(under_way, self.engine_requests)
            yield from self._answered(under_way, 1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self.engine.abort()
            pool.shutdown()

    @staticmethod
    def _answered(under_way: dict[Future, int], limit: int) -> Iterator[tuple]:
        """Yields what is answered, and waits until fewer than `limit` questions are under way."""
        while True:
            seconds = None if len(under_way) >= limit else 0
            done, _ = wait(under_way, seconds, FIRST_COMPLETED)
            if not done:
                return
            for future in sorted(done, key=lambda one: one.exception() is not None):
                yield [under_way.pop(future)], [future.result()]

    def begin(self, numbers: list[int], batch: list[Prepared]) -> list[Making]:
        """Embeds the prompts of a batch; what is returned has them answered."""
        pairs = list(zip(numbers, batch, strict=True))
        ready = iter(self._embedded([pair for pair in pairs if not is_failed(pair[1])]))
        return [partial(same, own[1]) if is_failed(own) else next(ready) for _, own in pairs]

    def _embedded(self, pairs: list[tuple[int, tuple[Question, list[Picture]]]]) -> list[Making]:
        """Of questions that have their pictures. A batch with one that the model refuses is taken
        one by one, to know which it is."""
        if not pairs:
            return []
        try:
            return self._makings(*map(list, zip(*pairs, strict=True)))
        except ValueError as error:
            if len(pairs) > 1:
                return [making for pair in pairs for making in self._embedded([pair])]
            return [partial(same, self._failed(f"{pairs[0][1][0]}: {error}", error))]

    @torch.inference_mode()
    def _makings(
        self, numbers: list[int], batch: list[tuple[Question, list[Picture]]]
    ) -> list[Making]:
        with self.tracing(batch) as trace:
            prompt, options = self._prompt(batch)
        metadata, masks = self.seen(batch, trace)
        unpruned, found = self.unpruned_tokens(batch, trace), []
        for row, (number, (question, _)) in enumerate(zip(numbers, batch, strict=True)):
            cost = partial(self.cost, trace, row, unpruned[row]) if self.measure else None
            own = row_of(prompt, row), metadata[row], masks[row], cost
            seed = {"seed": number} if self.temperature > 0 else {}
            found.append(partial(self._make, question, *own, options | seed))
        return found

    def _prompt(self, batch: list[tuple[Question, list[Picture]]]) -> tuple[Prompt, dict]:
        """(the embedded batch, keywords of `generate` for it)."""
        asked, options = self.request(batch)
        pruner = self.model.pruner
        pruner, kept = pruner.published.for_call(pruner, options)
        if not self.reuse:
            return self.engine.encode(self.model, **self.front.inputs(*asked), **options), kept
        with self.model.using(pruner):
            prompt, _ = self.known.embed(*asked, self.front.pad_id)
        self.engine.record(self.model, prompt)
        return prompt, kept

    def _make(
        self, question: Question, prompt: Prompt, metadata: dict, masks, cost, options: dict
    ) -> Answer | Failure:
        """The answer to one question; in a thread of its own."""
        if self.only_masks:
            return Answer("", metadata, masks)
        try:
            output = self.engine.generate(self.model, prompt, **options)
        except ValueError as error:
            return self._failed(f"{question}: {error}", error)
        if cost is not None:
            metadata = metadata | cost(new_tokens(output, end_tokens(self.model))[0])
        return Answer(self.front.decode(output)[0], metadata, masks)


def same(value):
    return value


def is_failed(prepared: Prepared) -> bool:
    return isinstance(prepared[1], Failure)


def row_of(prompt: Prompt, row: int) -> Prompt:
    """One prompt of a batch."""
    own = prompt.rows([row])
    return own if own.counts is None else replace(own, num_positions=own.counts.lengths[0])
