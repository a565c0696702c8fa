"""Answers on their way into a file: nothing that was answered is lost, and the file appears whole.

While a run lasts, every process appends its answers to a journal of its own, `X.parts/RANK.jsonl`,
whose lines are `{"number": of the question, "line": of the answers file}`. At the end `X.jsonl` is
written in question order, in one step, and the journals go. `X.settings.json` stays beside it: what
decided the answers, so that a run with other settings does not continue them.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial

from llava.eval.answering.settings import differences
from llava.eval.files.answer_lines import check_line, is_failed, parse_line
from llava.eval.files.records import kind_of, parse_json, read_json
from llava.eval.files.safe_writing import Lock, errors_with_name, replace_file, sync
from llava.eval.files.side_files import remove_side_files

SECONDS_BETWEEN_SYNCS = 1.0
JOURNAL = re.compile(r"\d+\.jsonl")
HOW_TO_GO_ON = "write to another place, or start it again with --overwrite"
REMOVE_LINE = "remove the line, and its question is asked again, or start with --overwrite"


class AnswersFile:
    """The answers to a list of questions, those of earlier runs and those of this one.

    path:      the file, made with its folder when needed
    heads:     per question, in order, the fields that identify its line
    settings:  what must be equal for two runs to belong together (JSON values)
    overwrite: start again even if there are answers; they go, and what says something of them
    fields:    what a line must have besides its head
    foreign:   continue a file that has no settings beside it, as other programs write

    `known` holds lines by number of their question. A question that failed in an earlier run is
    open again, whatever its record says by now, and half a line at the end of a file is passed
    over. Without `finish`, the answers
    wait for the next run. Raises ValueError when they belong to other questions or settings, when
    another process writes to the file, and one that names file and line when something is broken.
    """

    def __init__(
        self,
        path: str,
        heads: list[dict],
        settings: dict,
        overwrite: bool = False,
        fields: tuple[str, ...] = ("text",),
        foreign: bool = False,
    ):
        self.path, self.heads, self.fields, self.foreign = path, heads, fields, foreign
        self.settings_path = f"{os.path.splitext(path)[0]}.settings.json"
        self.lock, self.journal = Lock(path, folder(path)), Journal(path, 0)
        try:
            if overwrite:
                for name in [*journals(path), *filter(os.path.exists, [path])]:
                    os.remove(name)
                remove_side_files(path)
            self.known = self._continue(settings)
            if not self.known:
                self._replace(self.settings_path, json.dumps(settings, indent=2))
        except BaseException:
            self.lock.release()
            raise

    def _continue(self, settings: dict) -> dict[int, dict]:
        """The answers of earlier runs; what journals hold of them is put into one."""
        parse = partial(parse_line, fields=self.fields)
        there = os.path.exists(self.path)
        lines = enumerate(complete_lines(self.path, parse, HOW_TO_GO_ON)) if there else ()
        written, ahead = dict(lines), read_journals(self.path, self.fields)
        known = {n: line for n, line in written.items() if not is_failed(line)}
        self.written = there and len(known) == len(self.heads)
        if written or ahead:
            self._compare_settings(settings)
        self._compare_questions(written, self.path, "line")
        self._compare_questions(ahead, folder(self.path), "answer")
        ahead = {n: line for n, line in ahead.items() if n not in known and not is_failed(line)}
        if others := journals(self.path):
            self._replace(self.journal.name, "".join(map(journal_line, ahead, ahead.values())))
        for name in others:
            if name != self.journal.name:
                os.remove(name)
        return known | ahead

    def _compare_settings(self, settings: dict) -> None:
        if not os.path.exists(self.settings_path):
            if self.written or self.foreign:
                return
            raise ValueError(
                f"{self.path} has answers, but {self.settings_path}, which says how they were "
                f"made, is not there, so that they cannot be continued: {HOW_TO_GO_ON}"
            )
        before = read_json(self.settings_path)
        if not isinstance(before, dict):
            raise ValueError(
                f"{self.settings_path} holds {kind_of(before)}, not settings: {HOW_TO_GO_ON}"
            )
        if changed := differences(before, json.loads(json.dumps(settings))):
            raise ValueError(
                f"{self.path} was made with other settings ({'; '.join(changed)}): {HOW_TO_GO_ON}"
            )

    def _compare_questions(self, lines: dict[int, dict], place: str, what: str) -> None:
        if lines and max(lines) >= len(self.heads):
            raise ValueError(
                f"{place} has {max(lines) + 1} answers to {len(self.heads)} questions: "
                f"{HOW_TO_GO_ON}"
            )
        for number, line in lines.items():
            head = self.heads[number]
            # One that failed has no answer to lose, and its record may have been mended since.
            if not is_failed(line) and any(line.get(key) != value for key, value in head.items()):
                raise ValueError(
                    f"{place}, {what} {number + 1} answers question {line.get('question_id')!r}, "
                    f"but question {head['question_id']!r} comes there (or its text differs): the "
                    f"file belongs to other questions; {HOW_TO_GO_ON}"
                )

    @property
    def missing(self) -> list[int]:
        """Numbers of the questions without an answer, in order."""
        return [number for number in range(len(self.heads)) if number not in self.known]

    @property
    def num_failed(self) -> int:
        """Questions that failed in this run."""
        return sum(map(is_failed, self.known.values()))

    def put(self, number: int, line: dict) -> None:
        """Keeps the answer to the question with this number; one that is known is not replaced."""
        if number not in self.known:
            self.journal.put(number, line)
            self.known[number] = line

    def finish(self, patience: float = 0.0) -> None:
        """Writes the file, with what the journals of other processes hold.

        patience: seconds that a network file system may need to show what others have written
        Raises ValueError when answers are missing.
        """
        end = time.monotonic() + patience
        while self.missing:
            # What another process is still writing may look broken for a moment.
            self.known = read_journals(self.path, self.fields, tolerant=True) | self.known
            if self.missing and time.monotonic() >= end:
                raise ValueError(
                    f"{self.path} has {len(self.known)} of {len(self.heads)} answers: start the "
                    "same command again to go on"
                )
            time.sleep(1.0 if self.missing else 0.0)
        if not self.written:
            lines = (json.dumps(self.known[number]) for number in range(len(self.heads)))
            self._replace(self.path, "".join(f"{line}\n" for line in lines))
        self.journal.close()
        for name in journals(self.path):
            os.remove(name)

    def _replace(self, path: str, text: str) -> None:
        replace_file(path, text, os.path.join(folder(self.path), "new"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.journal.close()
        finally:
            self.lock.release()


class Journal:
    """One process's answers in the order they were found; of `path`, the answers file."""

    def __init__(self, path: str, rank: int):
        self.name, self.file = os.path.join(folder(path), f"{rank}.jsonl"), None

    def put(self, number: int, line: dict) -> None:
        """Appends an answer; it survives a crash of the program at once, of the machine soon."""
        if self.file is None:
            os.makedirs(os.path.dirname(self.name), exist_ok=True)
            self.file = open(self.name, "a", encoding="utf-8", newline="\n")
            self.synced = time.monotonic()
        with errors_with_name(self.name):
            self.file.write(journal_line(number, line))
            self.file.flush()
        if time.monotonic() - self.synced > SECONDS_BETWEEN_SYNCS:
            sync(self.file)
            self.synced = time.monotonic()

    def go_on(self) -> frozenset[int]:
        """Numbers of the questions in it, for a process that goes on where one died; half a line
        behind them is cut off."""
        if not os.path.exists(self.name):
            return frozenset()
        entries = complete_lines(self.name, partial(parse_entry, fields=()), REMOVE_LINE)
        numbers = frozenset(number for number, _ in entries)
        with open(self.name, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
        return numbers

    def close(self) -> None:
        if self.file is not None:
            sync(self.file)
            self.file = self.file.close()


def folder(path: str) -> str:
    """Where the journals of an answers file lie."""
    return f"{os.path.splitext(path)[0]}.parts"


def journals(path: str) -> list[str]:
    """The journals of an answers file."""
    names = sorted(filter(JOURNAL.fullmatch, os.listdir(folder(path))))
    return [os.path.join(folder(path), name) for name in names]


def read_journals(path: str, fields: tuple[str, ...], tolerant: bool = False) -> dict[int, dict]:
    """The lines that journals hold by number; an answer goes before the record of a failure.

    fields:   what the line of an answer must have
    tolerant: pass over whatever is broken, because it may still be written
    """
    found: dict[int, dict] = {}
    parse = partial(parse_entry, fields=fields)
    for name in journals(path):
        for number, line in complete_lines(name, parse, REMOVE_LINE, tolerant):
            if number not in found or is_failed(found[number]):
                found[number] = line
    return found


def complete_lines(
    path: str, parse: Callable[[bytes], object], advice: str, tolerant: bool = False
) -> Iterator:
    """Yields every complete line of a file, parsed. The last one may be no line of ours, which is
    what a crash leaves; ValueError names file and line when another one is broken."""
    with open(path, "rb") as file:
        *whole, _ = file.read().split(b"\n")
    for place, line in enumerate(whole, start=1):
        try:
            yield parse(line)
        except ValueError as error:
            if not tolerant and place < len(whole):
                sentence = f"{path}, line {place} is not an answer ({error}): {advice}"
                raise ValueError(sentence) from error


def parse_entry(entry: bytes, fields: tuple[str, ...]) -> tuple[int, dict]:
    """(number, line) of a line of a journal; ValueError with the reason when it is none."""
    value = parse_json(entry)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {kind_of(value)}")
    number, line = value.get("number"), value.get("line")
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"its number is {number!r:.40}")
    if not isinstance(line, dict):
        raise ValueError(f"its line is {kind_of(line)}, not an object")
    check_line(line, fields)
    return number, line


def journal_line(number: int, line: dict) -> str:
    return json.dumps({"number": number, "line": line}) + "\n"
