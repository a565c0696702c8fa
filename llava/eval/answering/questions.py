"""Questions in, answer lines out: how the records of every benchmark become questions."""

import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field

from PIL import Image

from llava import image_io
from llava.eval.files.records import is_id, kind_of


@dataclass
class Question:
    """One prompt to the model.

    head:   fields of the answer line that identify the question, in order
    text:   what the model reads, without image marks and template
    images: image files relative to the image folder; for tables the pictures themselves (base64)
    tail:   fields of the answer line that follow the answer
    where:  file and line it comes from
    error:  why it cannot be asked; None: it can
    boxes:  of each image, (left, top, right, bottom) in its pixels, ordered, what the answer is
            seen from; None: not known
    """

    head: dict
    text: str
    images: list[str] = field(default_factory=list)
    tail: dict = field(default_factory=dict)
    base64: bool = False
    where: str = ""
    error: str | None = None
    boxes: list[list[list[float]]] | None = None

    def answer_line(
        self, text: str, answer_id: str, model_id: str, metadata: dict | None = None
    ) -> dict:
        """Returns the record for the answers file, keys in the published order."""
        closing = {"answer_id": answer_id, "model_id": model_id, "metadata": metadata or {}}
        return {**self.head, "text": text, **self.tail, **closing}

    def failed_line(self, reason: str, answer_id: str, model_id: str) -> dict:
        """Returns the record of a question that got no answer: it has no `text` that a reader
        could take for one."""
        closing = {"answer_id": answer_id, "model_id": model_id, "metadata": {}}
        return {**self.head, "error": reason, **closing}

    def __str__(self):
        place = f" ({self.where})" if self.where else ""
        return f"question {self.head['question_id']}{place}"


def questions_of(
    records: Iterable[dict],
    to_questions: Callable[[dict], Iterable[Question]],
    skip_bad: bool = False,
) -> list[Question]:
    """Returns the questions of records, each with the place it comes from.

    skip_bad: a record that holds no question becomes one that cannot be asked (`Question.error`)
    Raises ValueError that names such a record otherwise.
    """
    questions = []
    for record in records:
        where = getattr(record, "where", "")
        try:
            own = [_checked_question(question) for question in to_questions(record)]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            bad = Question({"question_id": _id_of(record)}, "", where=where)
            bad.error = f"{bad}: no question can be read ({reason})"
            if not skip_bad:
                raise ValueError(bad.error) from error
            own = [bad]
        for question in own:
            question.where = where
        questions += own
    return questions


def _id_of(record: dict) -> str | int | float:
    """What a record that cannot be read calls itself, or else its place in the file."""
    names = (record.get(name) for name in ("question_id", "id", "index", "img_path"))
    return next(filter(is_id, names), getattr(record, "where", "").rpartition(", ")[2])


def _checked_question(question: Question) -> Question:
    """The question, when it is one; ValueError says what is wrong with it."""
    key = question.head["question_id"]
    if not is_id(key):
        raise ValueError(f"its id is {kind_of(key)}, not a text or a number")
    if not isinstance(question.text, str):
        raise ValueError(f"its text is {kind_of(question.text)}")
    if not question.text.isascii():
        question.text.encode()  # half a character (a lone surrogate) is no text
    if wrong := [image for image in question.images if not isinstance(image, str)]:
        raise ValueError(f"its image is {kind_of(wrong[0])}, not the name of a file")
    return question


def jsonl_questions(record: dict) -> Iterator[Question]:
    """The common format: `{question_id, image, text, category?}`; `image` may be a list."""
    images = record.get("image")
    images = [] if images in (None, "") else images if isinstance(images, list) else [images]
    head = {"question_id": record["question_id"], "prompt": record["text"]}
    yield Question(head, record["text"], images)


def load_image(question: Question, image: str, folder: str, as_stored: bool = True) -> Image.Image:
    """Returns a picture of a question in RGB; a missing or broken one names both.

    as_stored: neither turned upright nor put on white, as published results were made
    """
    try:
        if not question.base64:
            return image_io.load_image(os.path.join(folder, image), as_stored=as_stored)
        picture = image_io.image_from_base64(image)
        if as_stored:
            return image_io.to_rgb(picture, background=None)
        return image_io.displayed(picture)
    except (OSError, ValueError) as error:
        raise ValueError(f"{question}: {error}") from error


def get_chunk(items: list, num_chunks: int, chunk_idx: int) -> list:
    """Returns part `chunk_idx` of `num_chunks` equal parts of `items`; late ones may be empty."""
    if num_chunks < 1 or not 0 <= chunk_idx < num_chunks:
        raise ValueError(f"chunk {chunk_idx} of {num_chunks} does not exist, counting from 0")
    size = math.ceil(len(items) / num_chunks)
    return items[chunk_idx * size : (chunk_idx + 1) * size]


def subset(
    items: list, limit: int | None, together: Callable[[dict], Hashable] | None = None
) -> list:
    """Returns about `limit` items spread evenly, two neighbours at a time.

    Neighbours stay together because MME scores its two questions on an image jointly; items with
    the same `together` do wherever they stand, and count as one. Raises ValueError where nothing
    is left to ask.
    """
    if not items:
        raise ValueError(f"{getattr(items, 'path', 'the question file')} holds no question")
    if limit is None or limit >= len(items):
        return items
    if together and limit > 0:
        groups: dict[Hashable, list] = {}
        for item in items:
            groups.setdefault(together(item), []).append(item)
        chosen = subset(list(groups.values()), math.ceil(limit * len(groups) / len(items)))
        return [item for group in chosen for item in group]
    if limit < 1:
        raise ValueError(f"a limit of {limit} leaves no question")
    num_pairs = math.ceil(limit / 2)
    starts = [2 * (i * math.ceil(len(items) / 2) // num_pairs) for i in range(num_pairs)]
    return [item for start in starts for item in items[start : start + 2]]
