"""What answers are given for: a judge's score, the right text, letter or box.

A question names its rewards (`score_funcs` of its data set); an answer gets their sum.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from llava.answer_scores import (
    box_iou,
    first_box,
    judge_question,
    judged_score,
    one_box_format,
    parse_box,
    precision_match,
    share_box_iou,
    single_choice,
)
from llava.judge import Judge, JudgeError

logger = logging.getLogger(__name__)

LOCAL_JUDGE = "http://localhost:8000/v1"
JUDGED = ("llm", "precision_match_or_llm")
RIGHT_TEXTS = {
    "precision_match": precision_match,
    "single_choice": single_choice,
    "one_box_iou": lambda text, answer: box_iou(first_box(text), first_box(answer)),
    "one_box_format": lambda text, _: one_box_format(text),
    "share_box_iou": share_box_iou,
}
SCORE_FUNCS = (*JUDGED, *RIGHT_TEXTS)
#: rewards that compare boxes, how those are written, and whether a right answer has one
BOXES = {
    "one_box_iou": ("one box [x1, y1, x2, y2] in whole numbers", one_box_format),
    "share_box_iou": ("a box [x1, y1, x2, y2]", parse_box),
}


@dataclass(frozen=True)
class Wanted:
    """
    question:    in plain words, as the judge reads it
    answer:      the right one
    score_funcs: names of `SCORE_FUNCS`
    """

    question: str
    answer: str
    score_funcs: tuple[str, ...] = ("llm",)


def check_score_funcs(names: Sequence[str], answer: str, source: str) -> None:
    """Raises ValueError, naming the source, for unknown rewards, none, or a box to reach that the
    right answer does not have."""
    if unknown := sorted(set(names) - set(SCORE_FUNCS)):
        raise ValueError(
            f"{source}: score_funcs {', '.join(map(str, unknown))} are unknown, choose from "
            f"{', '.join(SCORE_FUNCS)}"
        )
    if not names:
        raise ValueError(
            f"{source} names no score_funcs: what is an answer rewarded for? Choose from "
            f"{', '.join(SCORE_FUNCS)}"
        )
    for name in BOXES.keys() & set(names):
        written, reads = BOXES[name]
        if not reads(answer):
            raise ValueError(f"{source}: {name} needs {written}, not {answer!r}")


@dataclass
class Scorer:
    """Scores answers.

    judge:  of the rewards in `JUDGED`; None: there are none
    most_failures: answers in a row that may stay without a verdict before scoring is given up
    requests, failures: of the judge so far, failures those without a reply

    An answer without a verdict has no score, NaN, so that nothing is learned from it.
    """

    judge: Judge | None = None
    most_failures: int = 64
    requests: int = 0
    failures: int = 0
    _in_a_row: int = field(default=0, repr=False)

    def scores(self, wanted: Sequence[Wanted], texts: Sequence[str]) -> list[float]:
        """The score of every text; those that a judge reads are asked about at once.

        Raises JudgeError after `most_failures` answers in a row without a verdict.
        """
        if not texts:
            return []
        workers = 1 if self.judge is None else self.judge.workers
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(self._score, wanted, texts))
        errors = [error for _, error in found if error is not None]
        self._count([error for _, error in found], wanted)
        if errors:
            logger.warning(
                "%d of %d answers have no verdict and are left out, the first because: %s",
                len(errors),
                len(texts),
                errors[0],
            )
        if self._in_a_row >= self.most_failures:
            raise JudgeError(
                f"the judge gave no verdict on {self._in_a_row} answers in a row, the last "
                f"because: {errors[-1]}"
            )
        return [score for score, _ in found]

    def _count(self, errors: list[JudgeError | None], wanted: Sequence[Wanted]) -> None:
        for error, one in zip(errors, wanted, strict=True):
            if set(one.score_funcs) & set(JUDGED):
                self.requests += 1
                self.failures += error is not None
                self._in_a_row = self._in_a_row + 1 if error is not None else 0

    def _score(self, wanted: Wanted, text: str) -> tuple[float, JudgeError | None]:
        try:
            return sum(self._one(name, wanted, text) for name in wanted.score_funcs), None
        except JudgeError as error:
            return math.nan, error

    def _one(self, name: str, wanted: Wanted, text: str) -> float:
        if name in RIGHT_TEXTS:
            return RIGHT_TEXTS[name](text, wanted.answer)
        if name == "precision_match_or_llm" and precision_match(text, wanted.answer):
            return 1.0
        if self.judge is None:
            raise ValueError(f"the reward {name} needs a judge: give the address of its endpoint")
        question = judge_question(wanted.question, wanted.answer, text)
        return judged_score(self.judge.ask(question))


def check_judge(judge: Judge) -> None:
    """Asks the judge about a right answer. Raises JudgeError when no score comes back."""
    reply = judge.ask(judge_question("What color is the sky?", "blue", "blue"))
    if not judged_score(reply):
        raise JudgeError(
            f"the judge {judge.model} at {judge.url} scores a right answer with {reply[:200]!r}: "
            'it has to say "score: <score>"'
        )


#: as the release asks its judge, which vLLM serves on the same machine
training_judge = partial(Judge, api_key="dummy", max_tokens=512, attempts=3, timeout=20.0)
