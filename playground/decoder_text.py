"""Questions about a picture as turns of ids, for the fast training of the decoder.

Every question is its own turn right behind the picture. Turns are sorted into buckets by length, so
that little is padded.
"""

from functools import lru_cache

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


@lru_cache
def prefix_ids() -> list[int]:
    """Ids in front of the picture."""
    return [1, *pieces().encode(SYSTEM)]


def turn_ids(question: questions.Question) -> tuple[list[int], int]:
    """Ids behind the picture, end mark included, and how many of them are the question."""
    asked = f"\n{question.text} ASSISTANT:"
    head = pieces().encode(asked)
    ids = pieces().encode(f"{asked} {question.answer}")
    if ids[: len(head)] != head:
        raise ValueError(f"the answer changes the pieces of its question: {question}")
    return [*ids, 2], len(head)


def named_places(scene: scenes.Scene, question: questions.Question) -> list[tuple[int, tuple]]:
    """Where a question's text names an item of the scene: index of the name's last id in
    `turn_ids`, and the item's box in px."""
    if question.task == "counting" or (question.task == "existence" and question.answer == "No"):
        return []
    found, asked = [], f"\n{question.bare}"
    for item in (*scene.things, *scene.signs):
        for name in (item.name, questions.short_name(scene, item)):
            end = asked.find(f" {name}") + len(name) + 1
            if end > len(name):
                found.append((len(pieces().encode(asked[:end])) - 1, item.box))
                break
    return found


def fill_buckets(scene: scenes.Scene, rng: np.random.Generator):
    """Turns of one picture: per bucket ids (turns, length), labels likewise and boxes (turns,
    length, 4) of what the text names (shares of the side, nan elsewhere); and the questions."""
    rows = [[] for _ in BUCKETS]
    for question in questions.ask(scene, rng):
        ids, asked = turn_ids(question)
        for row, (turns, length) in zip(rows, BUCKETS, strict=True):
            if len(ids) <= length and len(row) < turns:
                row.append((ids, asked, question))
                break
    filled = []
    for row, (turns, length) in zip(rows, BUCKETS, strict=True):
        ids = np.zeros((turns, length), np.int64)
        labels = np.full((turns, length), IGNORE, np.int64)
        boxes = np.full((turns, length, 4), np.nan, np.float32)
        for i, (turn, asked, question) in enumerate(row):
            ids[i, : len(turn)] = turn
            labels[i, asked - 1 : len(turn) - 1] = turn[asked:]
            for place, box in named_places(scene, question):
                boxes[i, place] = np.array(box) / scenes.IMAGE_SIZE
        filled.append((ids, labels, boxes))
    return filled, [question for row in rows for _, _, question in row]
