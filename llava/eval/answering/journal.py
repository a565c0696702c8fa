"""Answers that are ahead of their turn, kept beside the answers file until the gap is closed.

`X.parts/RANK.jsonl` belongs to one process of the run that writes `X.jsonl`; a line is
`{"number": of the question, "line": of the answers file}`.
"""

import errno
import json
import os
import re
import shutil
import time

from llava.eval.files.answer_lines import check_line, is_failed
from llava.eval.files.records import kind_of, parse_json

SECONDS_BETWEEN_SYNCS = 1.0
NAME = re.compile(r"\d+\.jsonl")
#: what a file says that cannot wait for its disk
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


def folder(path: str) -> str:
    """Where the journals of an answers file lie."""
    return os.path.splitext(path)[0] + ".parts"


def write_all(file, text: str) -> None:
    """Writes a text to an unbuffered file, however many calls it takes."""
    data = memoryview(text.encode())
    while data:
        data = data[file.write(data) :]


def sync(file) -> None:
    """Waits until a file survives a crash of the machine, where its file system can."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def _lines(numbers, records) -> str:
    pairs = zip(numbers, records, strict=True)
    return "".join(json.dumps({"number": n, "line": line}) + "\n" for n, line in pairs)


class Journal:
    """One process's answers in the order they were found; opened again, it goes on."""

    def __init__(self, path: str, rank: int):
        """path: of the answers file"""
        os.makedirs(folder(path), exist_ok=True)
        # Unbuffered and in append mode: whatever happens, only the last line can be incomplete.
        name = os.path.join(folder(path), f"{rank}.jsonl")
        self.file = open(name, "ab+", buffering=0)  # noqa: SIM115 closed by close()
        self.file.seek(0)
        content = self.file.read()
        self.file.truncate(content.rfind(b"\n") + 1)
        self.synced = time.monotonic()

    def write(self, numbers: list[int], records: list[dict]) -> None:
        """Appends the answers to the questions with these numbers, in one piece."""
        write_all(self.file, _lines(numbers, records))
        if time.monotonic() - self.synced > SECONDS_BETWEEN_SYNCS:
            self.sync()

    def sync(self) -> None:
        """Waits until the lines survive a crash of the machine."""
        sync(self.file)
        self.synced = time.monotonic()

    def close(self) -> None:
        self.sync()
        self.file.close()


def names(path: str) -> list[str]:
    """The journals of an answers file."""
    own = folder(path)
    found = sorted(os.listdir(own)) if os.path.isdir(own) else []
    return [os.path.join(own, name) for name in found if NAME.fullmatch(name)]


def read_journals(
    path: str, fields: tuple[str, ...] = (), tolerant: bool = False
) -> dict[int, dict]:
    """Returns the lines ahead of an answers file by number; where there are an answer and the
    record of a failure, the answer.

    fields:   what the line of an answer must have
    tolerant: pass over whatever is broken, because it may still be written
    The last line of a file may be half or garbled, as a crash leaves it, and does not count. Raises
    ValueError that names file and line when another one is broken.
    """
    found: dict[int, dict] = {}
    for name in names(path):
        with open(name, "rb") as file:
            *whole, _ = file.read().split(b"\n")
        for place, line in enumerate(whole, start=1):
            try:
                number, record = _parse(line, fields)
            except ValueError as error:
                if tolerant or place == len(whole):
                    continue
                raise ValueError(
                    f"{name}, line {place} is not an answer ({error}): remove the line, and its "
                    "question is asked again, or start with --overwrite"
                ) from error
            if number not in found or is_failed(found[number]):
                found[number] = record
    return found


def _parse(line: bytes, fields: tuple[str, ...]) -> tuple[int, dict]:
    entry = parse_json(line)
    if not isinstance(entry, dict):
        raise ValueError(f"expected an object, found {kind_of(entry)}")
    number, record = entry.get("number"), entry.get("line")
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"its number is {number!r:.40}")
    if not isinstance(record, dict):
        raise ValueError(f"its line is {kind_of(record)}, not an object")
    check_line(record, fields)
    return number, record


def rewrite_journals(path: str, answers: dict[int, dict]) -> None:
    """Puts the numbered answers in place of all that the journals of an answers file hold; no
    other process may be writing one."""
    others = names(path)
    os.makedirs(folder(path), exist_ok=True)
    first = os.path.join(folder(path), "0.jsonl")
    with open(f"{first}.tmp", "wb", buffering=0) as file:
        write_all(file, _lines(answers.keys(), answers.values()))
        sync(file)
    os.replace(f"{first}.tmp", first)
    for name in others:
        if name != first:
            os.remove(name)


def remove_journals(path: str) -> None:
    """Forgets what is ahead of an answers file."""
    shutil.rmtree(folder(path), ignore_errors=True)
