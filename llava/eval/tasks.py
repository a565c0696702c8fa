"""Question files in, answer lines out: one reader per file format of the benchmarks.

Every reader reports a broken record by file and line, because a file of 100,000 questions with one
bad line is found out at 3 a.m. otherwise.
"""

import csv
import json
import math
import os
import string
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

from llava import image_io

SINGLE_PRED_PROMPT = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接回答选项字母。",
}
OPTIONS = "ABCD"
TABLE_COLUMNS = ("index", "question", "A", "B", "image")
# What pandas, with which the published numbers were made, reads as a missing cell.
MISSING_CELLS = {"", "NA", "N/A", "n/a", "<NA>", "#N/A", "#NA", "NULL", "null", "-nan", "-NaN"}


@dataclass
class Question:
    """One prompt to the model.

    head:   fields of the answer line that identify the question, in order
    text:   what the model reads, without image marks and template
    images: image files relative to the image folder; for tables the pictures themselves (base64)
    tail:   fields of the answer line that follow the answer
    metadata: what was seen while answering; filled by the answer loop
    """

    head: dict
    text: str
    images: list[str] = field(default_factory=list)
    tail: dict = field(default_factory=dict)
    base64: bool = False
    metadata: dict = field(default_factory=dict)

    def answer_line(self, text: str, answer_id: str, model_id: str) -> dict:
        """Returns the record for the answers file, keys in the published order."""
        closing = {"answer_id": answer_id, "model_id": model_id, "metadata": self.metadata}
        return {**self.head, "text": text, **self.tail, **closing}

    def __str__(self):
        return f"question {self.head['question_id']}"


def read_jsonl(path: str, fields: tuple[str, ...] = ()) -> list[dict]:
    """Returns the records of a JSON-lines file; `fields` must be present in each of them."""
    records = []
    with open(path, "rb") as file:  # bytes, so that a line in a wrong encoding is named as well
        for number, line in enumerate(file, start=1):
            if line.strip():
                records.append(_parse_line(line, f"{path}, line {number}", fields))
    return records


def _parse_line(line: bytes, where: str, fields: tuple[str, ...]) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        raise ValueError(f"{where}: not valid JSON ({reason})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid UTF-8 ({error.reason})") from error
    return _checked(record, where, fields)


def _checked(record, where: str, fields) -> dict:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, found {type(record).__name__}")
    if missing := [name for name in fields if name not in record]:
        raise ValueError(f"{where}: no field {', '.join(map(repr, missing))}")
    return record


def read_json_list(path: str, fields: tuple[str, ...] = ()) -> list[dict]:
    """Returns the records of a JSON list; `fields` must be present in each of them."""
    records = read_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list, found {type(records).__name__}")
    return [_checked(r, f"{path}, item {i}", fields) for i, r in enumerate(records, start=1)]


def read_json(path: str):
    """Returns the content of a JSON file; a syntax error names file, line and column."""
    with open(path, encoding="utf-8") as file:
        try:
            return json.load(file)
        except json.JSONDecodeError as error:
            where = f"{path}, line {error.lineno}"
            raise ValueError(f"{where}: not valid JSON ({error.msg})") from error


def read_table(path: str, columns: tuple[str, ...] = TABLE_COLUMNS) -> list[dict]:
    """Returns the rows of a tab-separated table (cells are strings, missing ones None)."""
    csv.field_size_limit(2**31 - 1)  # a cell holds a whole picture
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.reader(file, delimiter="\t")
        header = next(reader, [])
        if missing := [name for name in columns if name not in header]:
            raise ValueError(f"{path}, line 1: no column {', '.join(missing)}")
        return [_table_row(row, header, f"{path}, line {reader.line_num}") for row in reader if row]


def _table_row(row: list[str], header: list[str], where: str) -> dict:
    if len(row) != len(header):
        raise ValueError(f"{where}: {len(row)} cells where the header has {len(header)}")
    return {
        name: None if is_missing(cell) else cell for name, cell in zip(header, row, strict=True)
    }


def is_missing(cell: str) -> bool:
    """True for an empty cell and for the ways in which tables spell "nothing"."""
    return cell in MISSING_CELLS or cell.lower() in ("nan", "none")


def jsonl_questions(record: dict) -> Iterator[Question]:
    """The common format: `{question_id, image, text, category?}`; `image` may be a list."""
    images = record.get("image") or []
    images = [images] if isinstance(images, str) else list(images)
    head = {"question_id": record["question_id"], "prompt": record["text"]}
    yield Question(head, record["text"], images)


def science_questions(record: dict, single_pred_prompt: bool = False) -> Iterator[Question]:
    """ScienceQA: `{id, image?, conversations}`; the recorded prompt shows if it has an image."""
    text = record["conversations"][0]["value"].replace("<image>", "").strip()
    if single_pred_prompt:
        text += "\n" + SINGLE_PRED_PROMPT["en"]
    images = [record["image"]] if record.get("image") else []
    prompt = "<image>\n" + text if images else text
    yield Question({"question_id": record["id"], "prompt": prompt}, text, images)


def mmbench_questions(
    row: dict, all_rounds: bool = False, single_pred_prompt: bool = False, lang: str = "en"
) -> Iterator[Question]:
    """MMBench: one question per row, or one per rotation of its options (circular evaluation)."""
    letters = list(_present_options(row))
    options = [row[letter] for letter in letters]
    question = "\n".join(part for part in (row.get("hint"), row["question"] or "") if part)
    suffix = "\n" + SINGLE_PRED_PROMPT[lang] if single_pred_prompt else ""
    for round_id in range(len(options) if all_rounds else 1):
        shown = _rotated(options, round_id)
        lines = [f"{letter}. {text}" for letter, text in zip(letters, shown, strict=True)]
        prompt = "\n".join([question, *lines])
        head = {"question_id": as_int(row["index"]), "round_id": round_id, "prompt": prompt}
        tail = {"options": shown, "option_char": _rotated(letters, round_id)}
        yield Question(head, prompt + suffix, [row["image"]], tail, base64=True)


def _rotated(items: list, by: int) -> list:
    return items[by:] + items[:by]


def _present_options(row: dict) -> Iterator[str]:
    for letter in OPTIONS:
        if row.get(letter) is None:
            return
        yield letter


def as_int(text: str) -> int | str:
    """Returns an integer where the text is one, else the text: identifiers come in both kinds."""
    try:
        return int(text)
    except ValueError:
        return text


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


def subset(items: list, limit: int | None) -> list:
    """Returns about `limit` items spread evenly, two neighbours at a time.

    Neighbours stay together because MME scores its two questions on an image jointly.
    """
    if limit is None or limit >= len(items):
        return items
    if limit < 1:
        raise ValueError(f"a limit of {limit} leaves no question")
    num_pairs = math.ceil(limit / 2)
    starts = [2 * (i * math.ceil(len(items) / 2) // num_pairs) for i in range(num_pairs)]
    return [item for start in starts for item in items[start : start + 2]]


def option_letter(text: str, options: list[str]) -> str | None:
    """Returns the letter chosen by an answer: `B`, `B.`, `(B) dog` or the option's own words."""
    text = text.strip()
    bare = text.lstrip("(")
    letters = string.ascii_uppercase[: len(options)]
    if bare[:1] in letters and bare and not bare[1:2].isalnum():
        return bare[0]
    wanted = text.rstrip(".").lower()
    return next((k for k, v in zip(letters, options, strict=True) if v.lower() == wanted), None)
