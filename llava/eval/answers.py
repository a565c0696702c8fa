"""The answers file: complete lines only, in question order, continued after any interruption.

Beside `X.jsonl` lies `X.settings.json` with the settings that produced it, so that a run with
other settings cannot continue the file by mistake. Answers found before their turn wait in
journals (`llava.eval.journal`).
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable

try:
    import fcntl
except ImportError:  # not on Windows; two writers are then not told apart
    fcntl = None

from llava.eval.journal import Journal, read_journals, remove_journals
from llava.eval.matching import unique
from llava.eval.tasks import Records

SECONDS_BETWEEN_SYNCS = 1.0
TAIL_BYTES = 2**16
HOW_TO_GO_ON = "write to another place, or start it again with --overwrite"


class AnswersFile:
    """Appends answer lines to a file; opened on an existing one, it continues where that ends.

    path:      the file, created with its folder when needed
    heads:     per question, in order, the fields that identify its line
    settings:  what must be equal for two runs to belong together (JSON values)
    overwrite: start again even if there are answers

    `num_done` lines were there already. Half a line at the end is removed. Raises ValueError when
    the lines answer other questions, or were made with other settings.

    Answers come in question order (`write`), or in any order with their numbers (`put`, and
    `finish` at the end); journals of other processes may help with the latter.
    """

    def __init__(self, path: str, heads: list[dict], settings: dict, overwrite: bool = False):
        self.path = path
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

    @property
    def known(self) -> set[int]:
        """Numbers of the questions that are answered, in the file or ahead of it."""
        return self.ahead.keys() | set(range(self.length))

    def _continue(self, settings: dict) -> int:
        """Cuts half a line off the end; returns how many complete lines there are."""
        self.file.seek(0)
        content = self.file.read()
        lines = _complete_lines(content, self.path)
        self.ahead = read_journals(self.path)
        if lines or self.ahead:
            self._compare_settings(settings)
            self._compare_questions({n: record for n, (_, record) in enumerate(lines)})
            self._compare_questions(self.ahead)
        self.file.truncate(sum(len(line) + 1 for line, _ in lines))
        return len(lines)

    def _compare_settings(self, settings: dict) -> None:
        if not os.path.exists(self.settings_path):
            return  # an answers file from elsewhere: its questions and model are compared below
        with open(self.settings_path, encoding="utf-8") as file:
            before = json.load(file)
        changed = [
            f"{key} was {before.get(key)!r} and is now {settings.get(key)!r}"
            for key in sorted(before.keys() | settings.keys())
            if before.get(key) != settings.get(key)
        ]
        if changed:
            raise ValueError(
                f"{self.path} was made with other settings ({'; '.join(changed)}): {HOW_TO_GO_ON}"
            )

    def _compare_questions(self, records: dict[int, dict]) -> None:
        if records and max(records) >= len(self.heads):
            raise ValueError(
                f"{self.path} has {max(records) + 1} answers to {len(self.heads)} questions: "
                f"{HOW_TO_GO_ON}"
            )
        for number, record in records.items():
            head = self.heads[number]
            if any(record.get(key) != value for key, value in head.items()):
                raise ValueError(
                    f"{self.path}, line {number + 1} answers question "
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
        data = memoryview("".join(json.dumps(r) + "\n" for r in records).encode())
        while data:
            data = data[self.file.write(data) :]
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
        self._take(read_journals(self.path).items())
        while self.length < len(self.heads) and time.monotonic() < end:
            time.sleep(1.0)
            self._take(read_journals(self.path).items())
        if self.length < len(self.heads):
            raise ValueError(
                f"{self.path} has {len(self.known)} of {len(self.heads)} answers: start the same "
                "command again to go on"
            )
        self._sync()
        remove_journals(self.path)

    def _sync(self) -> None:
        os.fsync(self.file.fileno())
        self.synced = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.journal:
            self.journal.close()
        self._sync()
        self.file.close()


def _complete_lines(content: bytes, path: str) -> list[tuple[bytes, dict]]:
    """Returns (bytes, record) of every complete line; only the last one may be incomplete."""
    *whole, _ = content.split(b"\n")
    lines = []
    for number, line in enumerate(whole, start=1):
        record = _parse(line)
        if record is None and number < len(whole):
            raise ValueError(f"{path}, line {number} is not an answer: {HOW_TO_GO_ON}")
        if record is not None:
            lines.append((line, record))
    return lines


def _parse(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "question_id" in record else None


def fingerprint(checkpoint: str) -> str:
    """Returns a digest that changes when the weights in a folder do; a name on the hub is its own.

    Names, sizes and last bytes of the weight files, so that it costs nothing.
    """
    if not os.path.isdir(checkpoint):
        return checkpoint
    digest = hashlib.sha256()
    for name in sorted(os.listdir(checkpoint)):
        if name.endswith((".safetensors", ".bin", ".pt")):
            with open(os.path.join(checkpoint, name), "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - TAIL_BYTES, 0))
                digest.update(f"{name} {size} ".encode() + file.read())
    return digest.hexdigest()[:16]


def read_answers_tolerantly(path: str) -> tuple[dict, int]:
    """Returns the answer texts by question id, and how many broken lines were passed over.

    Raises ValueError when two answers to one question differ.
    """
    records, num_broken = Records(path), 0
    with open(path, "rb") as file:
        for line in file:
            record = _parse(line)
            if record is None or "text" not in record:
                num_broken += 1
            else:
                records.append(record)
    return {key: answer["text"] for key, answer in unique(records).items()}, num_broken
