"""Answers that are ahead of their turn, kept beside the answers file until the gap is closed.

`X.parts/RANK.jsonl` belongs to one process of the run that writes `X.jsonl`; a line is
`{"number": of the question, "line": of the answers file}`.
"""

import json
import os
import shutil
import time

SECONDS_BETWEEN_SYNCS = 1.0


def folder(path: str) -> str:
    """Where the journals of an answers file lie."""
    return os.path.splitext(path)[0] + ".parts"


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
        pairs = zip(numbers, records, strict=True)
        lines = "".join(json.dumps({"number": n, "line": line}) + "\n" for n, line in pairs)
        data = memoryview(lines.encode())
        while data:
            data = data[self.file.write(data) :]
        if time.monotonic() - self.synced > SECONDS_BETWEEN_SYNCS:
            self.sync()

    def sync(self) -> None:
        """Waits until the lines survive a crash of the machine."""
        os.fsync(self.file.fileno())
        self.synced = time.monotonic()

    def close(self) -> None:
        self.sync()
        self.file.close()


def read_journals(path: str) -> dict[int, dict]:
    """Returns the answers ahead of an answers file by number; incomplete lines do not count."""
    answers: dict[int, dict] = {}
    names = os.listdir(folder(path)) if os.path.isdir(folder(path)) else []
    for name in sorted(names):
        with open(os.path.join(folder(path), name), "rb") as file:
            for line in file:
                entry = _parse(line)
                if entry is not None:
                    answers.setdefault(*entry)
    return answers


def _parse(line: bytes) -> tuple[int, dict] | None:
    try:
        entry = json.loads(line)
        return int(entry["number"]), dict(entry["line"])
    except (ValueError, TypeError, KeyError):
        return None


def remove_journals(path: str) -> None:
    """Forgets what is ahead of an answers file."""
    shutil.rmtree(folder(path), ignore_errors=True)
