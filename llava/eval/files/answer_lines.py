"""The lines of an answers file: answers, and the records of questions that failed.

An answer has a `text`. A question that was passed over (`--skip-bad`) has an `error` that says why,
and no text, so that no reader can take it for an answer.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from llava.eval.files import budgets
from llava.eval.files.matching import unique
from llava.eval.files.records import Records, is_id, kind_of, parse_json, read_jsonl


@dataclass(frozen=True)
class Answer:
    """What a model said.

    metadata: what was seen meanwhile, such as visual tokens (`budgets`)
    masks:    what was kept of each image, where that was asked for (`kept_masks`)
    """

    text: str
    metadata: dict = field(default_factory=dict)
    masks: tuple | None = None


@dataclass(frozen=True)
class Failure:
    """Stands for the answer to a question that cannot be answered; reason: why, naming it."""

    reason: str


class NothingAnswered(ValueError):
    """All questions failed."""

    def __init__(self, count: int, first: str):
        super().__init__(f"all {count} questions failed, the first: {first}")


def is_failed(record: dict) -> bool:
    """Whether a line says that its question failed."""
    return "error" in record and "text" not in record


def parse_line(line: bytes, fields: tuple[str, ...] = ("text",)) -> dict:
    """The record of a line of an answers file, an answer or a failed question.

    fields: what a line must have that is no failed question's, besides a `question_id`
    Raises ValueError with the reason when it is neither.
    """
    record = parse_json(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {kind_of(record)}")
    check_line(record, fields)
    return record


def check_line(record: dict, fields: tuple[str, ...] = ("text",), with_id: bool = True) -> None:
    """Raises ValueError when a record cannot be a line of an answers file."""
    needed = ("question_id",) if with_id else ()
    needed += ("error",) if is_failed(record) else fields
    if missing := [name for name in needed if name not in record]:
        raise ValueError(f"no field {', '.join(map(repr, missing))}")
    key = record.get("question_id", "")
    if not is_id(key):
        raise ValueError(f"question_id is {kind_of(key)}")
    for name in ("text", "prompt", "error", "question", "img_path"):
        if not isinstance(record.get(name, ""), str):
            raise ValueError(f"{name!r} is {kind_of(record[name])}, not a text")
    for name in ("options", "option_char", "candidates"):
        value = record.get(name, [])
        if name == "option_char" and isinstance(value, str):
            continue  # as good as a list of its letters
        if not (isinstance(value, list) and all(map(is_id, value))):
            raise ValueError(f"{name!r} is {kind_of(value)}, not a list of texts")
    if not is_id(record.get("round_id", 0)):
        raise ValueError(f"'round_id' is {kind_of(record['round_id'])}, not a number")
    _check_metadata(record.get("metadata") or {})


def _check_metadata(metadata) -> None:
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata is {kind_of(metadata)}")
    for name in (budgets.PER_LAYER, budgets.AT_END, budgets.ALL):
        value = metadata.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ValueError(f"{name} is {value!r:.40}, not a number of tokens")
    if metadata.get(budgets.ALL) and budgets.PER_LAYER not in metadata:
        raise ValueError(f"no {budgets.PER_LAYER} in its metadata")


def read_lines(path: str, fields: tuple[str, ...] = ("question_id", "text")) -> Records:
    """All records of an answers file: answers, and questions that failed.

    fields: what an answer must have
    Raises ValueError that names file and line when one is neither.
    """
    records = read_jsonl(path)
    wanted = tuple(name for name in fields if name != "question_id")
    for record in records:
        try:
            check_line(record, wanted, "question_id" in fields)
        except ValueError as error:
            raise ValueError(f"{record.where}: {error}") from error
    return records


def read_answers(path: str, fields: tuple[str, ...] = ("question_id", "text")) -> Records:
    """The answers of a file; says on stderr how many of its questions failed and are left out.

    Raises ValueError when there is nothing, or failed questions only, and as `read_lines` does.
    """
    records = read_lines(path, fields)
    if not records:
        raise ValueError(f"{path}: there are no answers in it")
    answers = answers_among(records)
    if len(answers) < len(records):
        failed = [record for record in records if is_failed(record)]
        print(f"warning: {path}: {failed_sentence(failed, len(records))}", file=sys.stderr)
    return answers


def answers_among(records: list[dict]) -> Records:
    """The records that are answers. Raises NothingAnswered when all questions failed."""
    answers = [record for record in records if not is_failed(record)]
    if records and not answers:
        raise NothingAnswered(len(records), records[0]["error"])
    return Records(getattr(records, "path", "the answers"), answers)


def failed_sentence(failed: list[dict], count: int) -> str:
    """How many of `count` questions failed, and why the first of them did."""
    return (
        f"{len(failed)} of {count} questions failed and have no answer; the first: "
        f"{failed[0]['error']}"
    )


def read_answers_tolerantly(path: str) -> tuple[dict, int]:
    """Returns the answer texts by question id, and how many broken lines were passed over; says on
    stderr how many questions failed. Raises ValueError when two answers to one question differ."""
    answers, num_broken, failed = Records(path), 0, []
    with open(path, "rb") as file:
        lines = file.readlines()
    for line in lines:
        try:
            record = parse_line(line)
        except ValueError:
            num_broken += 1
            continue
        if is_failed(record):
            failed.append(record)
        else:
            answers.append(record)
    if failed:
        print(f"warning: {path}: {failed_sentence(failed, len(lines))}", file=sys.stderr)
    return {key: answer["text"] for key, answer in unique(answers).items()}, num_broken
