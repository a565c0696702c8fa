"""Reader of the Visual-CoT benchmark: free-form questions with the box of what matters.

A file is a list of `{question_id, image: [path, "path###[x1, y1, x2, y2]"], conversations}`, the
conversation being question, box, `<image>` and answer.
"""

import json
import os
from collections.abc import Iterator

from llava.eval.answering.questions import Question
from llava.eval.files.records import Record, Records, read_json_list

ASKS_FOR_BOX = (
    "Please provide the bounding box coordinate of the region that can help you answer the "
    "question better."
)
BRIEF = "\n\nAnswer the question using a single word or phrase."
#: the sets whose mean is the published number (a thirteenth, emotic, is not evaluated)
SETS = (
    "flickr30k",
    "visual7w",
    "gqa",
    "openimages",
    "vsr",
    "cub",
    "docvqa",
    "textcap",
    "textvqa",
    "dude",
    "sroie",
    "infographicsvqa",
)


def viscot_questions(record: dict, brief: bool = False) -> Iterator[Question]:
    """The question without its request for a box; the answer line carries the right answer."""
    turns = [turn["value"] for turn in record["conversations"]]
    text = turns[0].replace("<image>\n", "").replace(ASKS_FOR_BOX, "").strip()
    text += BRIEF if brief else ""
    head = {"question_id": record["question_id"], "prompt": text}
    yield Question(head, text, [image_of(record)], tail={"answer": turns[-1]})


def image_of(record: dict) -> str:
    """Path of the picture, relative to the image folder."""
    image = record["image"]
    return image if isinstance(image, str) else image[0]


def box_of(record: dict) -> list[float] | None:
    """Returns the box in pixels that the second image entry names, or None."""
    images = record["image"]
    if isinstance(images, str) or len(images) < 2 or "###" not in images[1]:
        return None
    return json.loads(images[1].split("###")[1])


def read(path: str, folder: str | None = None) -> list[dict]:
    """Returns the records of a file.

    folder: where the pictures are; a picture that is not there but in `val/` below its set's
            folder (`cot/SET/val/...`, as in some downloads) is taken from there
    """
    records = read_json_list(path)
    if folder is None:
        return records
    return Records(path, (_located(record, folder) for record in records))


def _located(record: Record, folder: str) -> Record:
    """The record with its picture where that is; a broken one as it is, its reader names it."""
    try:
        image = [_present(image_of(record), folder), *record["image"][1:]]
    except (ValueError, TypeError, AttributeError, IndexError, KeyError):
        return record
    return Record({**record, "image": image}, record.where)


def _present(image: str, folder: str) -> str:
    if os.path.exists(os.path.join(folder, image)):
        return image
    top, name, *rest = image.split("/")
    elsewhere = "/".join([top, name, "val", *rest])
    return elsewhere if os.path.exists(os.path.join(folder, elsewhere)) else image
