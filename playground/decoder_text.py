"""Questions about a picture as turns of ids, for the fast training of the decoder.

Every question is its own turn right behind the picture. Turns are sorted into buckets by length, so
that little is padded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import sentencepiece

from playground import questions, scenes, tokenizer
from playground.tower_model import IGNORE

# (turns per picture, ids per turn): short answers, boxes and long questions, options, description
BUCKETS = ((14, 20), (8, 25), (2, 36), (1, 70))
SYSTEM = tokenizer.SYSTEM.removesuffix("ASSISTANT:")  # ends with "USER: "


@lru_cache
def pieces() -> sentencepiece.SentencePieceProcessor:
    """The tokenizer, built in memory."""
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.build())


@dataclass(frozen=True)
class Wording:
    """How a model writes a question about a picture, and what it answers.

    encode:  text to ids
    head:    text in front of the picture
    opening, closing: what stands right in front of the question and between it and the answer
    end:     id of the end mark
    buckets: as `BUCKETS`
    """

    encode: Callable[[str], list[int]]
    head: str
    opening: str
    closing: str
    end: int
    buckets: tuple[tuple[int, int], ...] = BUCKETS

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """Ids in front of the picture."""
        return tuple(self.encode(self.head))

    def turn(self, question: questions.Question) -> tuple[list[int], int]:
        """Ids behind the picture, end mark included, and how many of them are the question."""
        asked = f"{self.opening}{question.text}{self.closing}"
        head = self.encode(asked)
        ids = self.encode(f"{asked} {question.answer}")
        if ids[: len(head)] != head:
            raise ValueError(f"the answer changes the pieces of its question: {question}")
        return [*ids, self.end], len(head)

    def named_places(
        self, scene: scenes.Scene, question: questions.Question
    ) -> list[tuple[int, tuple]]:
        """Where a question's text names an item of the scene: index of the name's last id in
        `turn`, and the item's box in px."""
        if question.task == "counting" or (
            question.task == "existence" and question.answer == "No"
        ):
            return []
        found, asked = [], f"{self.opening}{question.bare}"
        for item in (*scene.things, *scene.signs):
            for name in (item.name, questions.short_name(scene, item)):
                end = asked.find(f" {name}") + len(name) + 1
                if end > len(name):
                    found.append((len(self.encode(asked[:end])) - 1, item.box))
                    break
        return found


LLAVA = Wording(
    encode=lambda text: pieces().encode(text),
    head=SYSTEM,
    opening="\n",
    closing=" ASSISTANT:",
    end=2,
)


def prefix_ids() -> list[int]:
    """Ids in front of LLaVA's picture."""
    return [1, *LLAVA.prefix]


def turn_ids(question: questions.Question) -> tuple[list[int], int]:
    """`Wording.turn` of LLaVA."""
    return LLAVA.turn(question)


def fill_buckets(scene: scenes.Scene, rng: np.random.Generator, wording: Wording = LLAVA):
    """Turns of one picture: per bucket ids (turns, length), labels likewise and boxes (turns,
    length, 4) of what the text names (shares of the side, nan elsewhere); and the questions."""
    buckets = wording.buckets
    rows = [[] for _ in buckets]
    for question in questions.ask(scene, rng):
        ids, asked = wording.turn(question)
        for row, (turns, length) in zip(rows, buckets, strict=True):
            if len(ids) <= length and len(row) < turns:
                row.append((ids, asked, question))
                break
    filled = []
    for row, (turns, length) in zip(rows, buckets, strict=True):
        ids = np.zeros((turns, length), np.int64)
        labels = np.full((turns, length), IGNORE, np.int64)
        boxes = np.full((turns, length, 4), np.nan, np.float32)
        for i, (turn, asked, question) in enumerate(row):
            ids[i, : len(turn)] = turn
            labels[i, asked - 1 : len(turn) - 1] = turn[asked:]
            for place, box in wording.named_places(scene, question):
                boxes[i, place] = questions.box_shares(scene, box)
        filled.append((ids, labels, boxes))
    return filled, [question for row in rows for _, _, question in row]
