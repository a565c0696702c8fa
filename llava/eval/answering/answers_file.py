"""The answers file: complete lines only, in question order, continued after any interruption.

Beside `X.jsonl` lies `X.settings.json` with the settings that produced it, so that a run with
other settings cannot continue the file by mistake. Answers found before their turn wait in
journals (`llava.eval.answering.journal`).
"""

import errno
import functools
import json
import os
import time
import warnings
from collections.abc import Iterable

try:
    import fcntl
except ImportError:  # not on Windows; two writers are then not told apart
    fcntl = None

from llava.eval.answering.journal import (
    SECONDS_BETWEEN_SYNCS,
    Journal,
    read_journals,
    remove_journals,
    rewrite_journals,
    sync,
    write_all,
)
from llava.eval.answering.journal import folder as journal_folder
from llava.eval.files.answer_lines import is_failed, parse_line, read_answers_tolerantly
from llava.eval.files.fingerprints import fingerprint
from llava.eval.files.records import kind_of, read_json

__all__ = ["AnswersFile", "fingerprint", "read_answers_tolerantly"]

HOW_TO_GO_ON = "write to another place, or start it again with --overwrite"
#: what a file system says that has no locks, such as some network file systems
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


class AnswersFile:
    """Appends answer lines to a file; opened on an existing one, it continues where that ends.

    path:      the file, created with its folder when needed
    heads:     per question, in order, the fields that identify its line
    settings:  what must be equal for two runs to belong together (JSON values)
    overwrite: start again even if there are answers
    fields:    what a line must have besides its head
    foreign:   continue a file that has no settings beside it, as other programs write

    `num_done` lines were there already. Half a line at the end is removed; questions that failed
    are open again, and answers behind the first of them wait in a journal. Raises ValueError when
    the lines answer other questions, or were made with other settings, and one that names file and
    line when something else is broken.

    Answers come in question order (`write`), or in any order with their numbers (`put`, and
    `finish` at the end); journals of other processes may help with the latter. `failed` holds the
    numbers of the questions that failed in this run.
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
        self.path, self.fields, self.foreign, self.failed = path, fields, foreign, []
        self.settings_path = os.path.splitext(path)[0] + ".settings.json"
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        # Unbuffered and in append mode: whatever happens, only the last line can be incomplete.
        self.file = open(path, "ab+", buffering=0)  # noqa: SIM115 closed by __exit__
        self.synced = time.monotonic()
        try:
            self._lock()
            self.heads, self.journal, self.ahead = heads, None, {}
            if overwrite:
                remove_journals(path)
            self.num_done = self.length = 0 if overwrite else self._continue(settings)
            if not self.num_done:
                self.file.truncate(0)
            if not self.known:
                self._write_settings(settings)
        except BaseException:
            self.file.close()
            raise

    def _lock(self) -> None:
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing to {self.path}") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise ValueError(f"cannot lock {self.path}: {error.strerror}") from error
            warn_of_no_locks()

    @property
    def known(self) -> set[int]:
        """Numbers of the questions that are answered, in the file or ahead of it."""
        return self.ahead.keys() | set(range(self.length))

    def _continue(self, settings: dict) -> int:
        """Cuts half a line and what follows a failed question off the end; returns how many lines
        are left."""
        self.file.seek(0)
        lines = _complete_lines(self.file.read(), self.path, self.fields)
        ahead = read_journals(self.path, self.fields)
        failed = [n for n, (_, record) in enumerate(lines) if is_failed(record)]
        if lines or ahead:
            finished = len(lines) == len(self.heads) and not failed
            self._compare_settings(settings, finished)
            self._compare_questions({n: record for n, (_, record) in enumerate(lines)}, self.path)
            self._compare_questions(ahead, journal_folder(self.path))
        num_left = failed[0] if failed else len(lines)
        found = ahead | {n: record for n, (_, record) in enumerate(lines) if n >= num_left}
        self.ahead = {n: r for n, r in found.items() if n >= num_left and not is_failed(r)}
        if len(self.ahead) < len(found):  # before the file is cut, so that a crash loses nothing
            rewrite_journals(self.path, self.ahead)
        self.file.truncate(sum(len(line) + 1 for line, _ in lines[:num_left]))
        return num_left

    def _compare_settings(self, settings: dict, finished: bool) -> None:
        if not os.path.exists(self.settings_path):
            if finished or self.foreign:
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

    def _compare_questions(self, records: dict[int, dict], place: str) -> None:
        if records and max(records) >= len(self.heads):
            raise ValueError(
                f"{place} has {max(records) + 1} answers to {len(self.heads)} questions: "
                f"{HOW_TO_GO_ON}"
            )
        for number, record in records.items():
            head = self.heads[number]
            if any(record.get(key) != value for key, value in head.items()):
                line = "line" if place == self.path else "answer"
                raise ValueError(
                    f"{place}, {line} {number + 1} answers question "
                    f"{record.get('question_id')!r}, but question {head['question_id']!r} comes "
                    "there (or its text differs): the file belongs to other questions; "
                    f"{HOW_TO_GO_ON}"
                )

    def _write_settings(self, settings: dict) -> None:
        temporary = f"{self.settings_path}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(settings, file, indent=2)
        os.replace(temporary, self.settings_path)

    def write(self, records: list[dict]) -> None:
        """Appends lines; they survive a crash of the program at once, of the machine soon."""
        write_all(self.file, "".join(json.dumps(r) + "\n" for r in records))
        self.failed += [self.length + n for n, r in enumerate(records) if is_failed(r)]
        self.length += len(records)
        if time.monotonic() - self.synced > SECONDS_BETWEEN_SYNCS:
            self._sync()

    def put(self, numbers: list[int], records: list[dict]) -> None:
        """Keeps the answers to the questions with these numbers; those known are not replaced."""
        if numbers != list(range(self.length, self.length + len(numbers))):
            self.journal = self.journal or Journal(self.path, 0)
            self.journal.write(numbers, records)
        self._take(zip(numbers, records, strict=True))

    def _take(self, answers: Iterable[tuple[int, dict]]) -> None:
        """Keeps numbered answers in mind, and writes those whose turn it is."""
        for number, record in answers:
            if number >= self.length:
                self.ahead.setdefault(number, record)
        following = []
        while self.length + len(following) in self.ahead:
            following.append(self.ahead.pop(self.length + len(following)))
        if following:
            self.write(following)

    def finish(self, patience: float = 0.0) -> None:
        """Takes in the journals of all processes.

        patience: seconds that a network file system may need to show what others have written
        Raises ValueError when answers are missing.
        """
        end = time.monotonic() + patience
        self._take_journals()
        while self.length < len(self.heads) and time.monotonic() < end:
            time.sleep(1.0)
            self._take_journals()
        if self.length < len(self.heads):
            raise ValueError(
                f"{self.path} has {len(self.known)} of {len(self.heads)} answers: start the same "
                "command again to go on"
            )
        self._sync()
        remove_journals(self.path)

    def _take_journals(self) -> None:
        # What another process is still writing may look broken for a moment.
        self._take(read_journals(self.path, self.fields, tolerant=True).items())

    def _sync(self) -> None:
        sync(self.file)
        self.synced = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.journal:
            self.journal.close()
        self._sync()
        self.file.close()


@functools.cache  # said once, however many files there are
def warn_of_no_locks() -> None:
    warnings.warn(
        "the file system of the answers has no locks: two runs that write to the same file would "
        "not notice each other",
        stacklevel=4,
    )


def differences(before: dict, now: dict, name: str = "") -> list[str]:
    """What differs between two sets of settings, in words; those inside others by `outer.inner`."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{name}{key}.")
        elif old != new or isinstance(old, bool) != isinstance(new, bool):
            found.append(f"{name}{key} was {_short(old)} and is now {_short(new)}")
    return found


def _short(value, most: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _complete_lines(content: bytes, path: str, fields: tuple[str, ...]) -> list[tuple[bytes, dict]]:
    """Returns (bytes, record) of every complete line; only the last one may be no line of ours,
    which is what a crash leaves."""
    *whole, _ = content.split(b"\n")
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            lines.append((line, parse_line(line, fields)))
        except ValueError as error:
            if number < len(whole):
                raise ValueError(
                    f"{path}, line {number} is not an answer ({error}): {HOW_TO_GO_ON}"
                ) from error
    return lines
