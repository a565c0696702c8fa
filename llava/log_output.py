"""Log lines on their way out: whatever happens to the place they go to, the program goes on.

A disk may be full, a pipe may have no reader any more, or one that does not read. Lines are handed
to a thread; what cannot be written is dropped and counted, and one line says how many were lost as
soon as there is room again.
"""

from __future__ import annotations

import errno
import logging
import logging.handlers
import os
import re
import sys
import threading
import time
import traceback
from pathlib import Path
from queue import SimpleQueue

WAITING_LINES = 4096  # that wait to be written; further ones are dropped
LINE_CHARACTERS = 8192
LAST_SECONDS = 1.0  # that lines get to be written when the program ends
PLACES = 8  # of an error, the innermost ones
TRACEBACK = "Traceback (most recent call last):"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def printable(text: str) -> str:
    """`text` in one line: line ends, control characters and lone surrogates as escapes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def error_places(error: BaseException) -> str:
    """Kind and places of an error in one line. Its message is left out: it may hold what a visitor
    sent."""
    while inner := getattr(error, "exceptions", None):  # a group: the first of them says where
        error = inner[0]
    frames = traceback.extract_tb(error.__traceback__)
    return _places(type(error).__name__, [(f.filename, f.lineno, f.name) for f in frames])


def without_tracebacks(message: str) -> str:
    """`message` with the text of a traceback in it replaced by its kind and places."""
    text, found, printed = message.partition(TRACEBACK)
    if not found:
        return message
    frames = re.findall(r'File "([^"]*)", line (\d+), in (\S+)', printed)
    ends = [line for line in printed.splitlines() if line[:1].isalpha()]
    kind = re.match(r"[\w.]*", ends[-1] if ends else "an error")[0]
    return f"{text.strip()} {_places(kind, frames)}".strip()


def _places(kind: str, frames: list[tuple]) -> str:
    places = [f"{Path(file).name}:{line} {name}" for file, line, name in frames[-PLACES:]]
    return f"{kind} at {' > '.join(places) or 'no place'}"


class LineFormatter(logging.Formatter):
    """One line for every record. Of an error that others log, the kind and the places are kept."""

    def __init__(self):
        super().__init__(
            "%(asctime)s | %(levelname)s | %(name)s | %(message)s", "%Y-%m-%d %H:%M:%S"
        )

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            # What asyncio and uvicorn put below the first line repeats the error's own text.
            message = f"{message.partition(chr(10))[0]}: {error_places(record.exc_info[1])}"
        message = without_tracebacks(message)
        plain = logging.makeLogRecord(
            {**record.__dict__, "msg": message, "args": None}
            | {"exc_info": None, "exc_text": None, "stack_info": None}
        )
        return printable(super().format(plain))[:LINE_CHARACTERS]


class RawOutput:
    """An open file without a buffer, so that what failed is not written later, behind its count."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def write(self, data: bytes) -> int:
        return os.write(self.descriptor, data)


class DailyFile(logging.handlers.TimedRotatingFileHandler):
    """The file at `path`, a new one each day (UTC). Opened when it is first needed, so that a full
    disk does not keep the program from starting; other mistakes are raised at once."""

    def __init__(self, path: Path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
        super().__init__(path, when="D", utc=True, delay=True)
        try:
            self.stream = self._open()
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise

    def _open(self):
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return open(self.baseFilename, "ab", buffering=0)

    def write(self, data: bytes) -> int:
        if self.shouldRollover(None):
            try:
                self.doRollover()
            except OSError:
                pass  # today's lines go on in yesterday's file
        if self.stream is None:
            self.stream = self._open()
        return self.stream.write(data) or 0


class LineHandler(logging.Handler):
    """Writes records to `output` in a thread of its own. Never waits and never fails.

    output:     has `write(data) -> bytes written`, which may raise anything
    per_minute: lines in a minute beyond which lines are dropped, None for any number: strangers
                must not be able to fill a disk
    """

    def __init__(self, output, per_minute: int | None = None):
        super().__init__()
        self.output, self.per_minute = output, per_minute
        self.setFormatter(LineFormatter())
        self._lines: SimpleQueue[tuple[int, str]] = SimpleQueue()
        # Written by `emit`, which has the handler's lock:
        self._minute = self._in_minute = self._refused = self._accepted = 0
        # and by the thread alone:
        self._failed = self._done = 0
        self._torn = False
        threading.Thread(target=self._run, name="log", daemon=True).start()

    @property
    def lost(self) -> int:
        """Lines that were dropped and not yet reported."""
        return self._refused + self._failed

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # arguments that do not fit their message
            line = f"a line of {record.name} cannot be formatted: {type(error).__name__}"
        if self._lines.qsize() >= WAITING_LINES or self._are_enough():
            self._refused += 1
            return
        self._accepted += 1
        self._lines.put((self._refused, line))
        self._refused = 0

    def _are_enough(self) -> bool:
        """Whether this minute has all of its lines; counts this one."""
        minute = int(time.monotonic() / 60)
        if minute != self._minute:
            self._minute, self._in_minute = minute, 0
        self._in_minute += 1
        return self.per_minute is not None and self._in_minute > self.per_minute

    def flush(self) -> None:
        """Waits until all is written, but not for long."""
        end, last = time.monotonic() + LAST_SECONDS, self._accepted
        while self._done < last and time.monotonic() < end:
            time.sleep(0.002)

    def _run(self) -> None:
        while True:
            refused, line = self._lines.get()
            self._failed += refused
            self._write(line)
            self._done += 1

    def _write(self, line: str) -> None:
        try:
            if self._failed:
                self._write_whole(self._note(self._failed))
                self._failed = 0
            self._write_whole(line)
        except Exception:
            self._failed += 1

    def _note(self, lost: int) -> str:
        text = f"{lost} lines are lost here: there was no room, or they were too many"
        return self.format(
            logging.makeLogRecord({"name": "log", "levelname": "WARNING", "msg": text})
        )

    def _write_whole(self, line: str) -> None:
        start = b"\n" if self._torn else b""  # the end of a line that was cut off by a full disk
        data = memoryview(start + line.encode("utf-8", "backslashreplace") + b"\n")
        while data:
            written = self.output.write(data)
            if not written:
                raise OSError(errno.EIO, "nothing was written")
            data, self._torn = data[written:], written < len(data)


class Unfailing:
    """A text stream whose writes never raise: what has no room is dropped."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError):
            pass
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            pass


def protect_standard_streams() -> None:
    """Makes `print` harmless where stdout or stderr go to a full disk or a closed pipe."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Unfailing):
            setattr(sys, name, Unfailing(stream))


def log_to_stderr(per_minute: int | None = None) -> None:
    """Sends all records to stderr as it is now, through `LineHandler`, unless the program has
    handlers of its own already. A handler of others that fails keeps quiet about it."""
    logging.raiseExceptions = False
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(LineHandler(RawOutput(_descriptor(sys.stderr)), per_minute))
        root.setLevel(logging.INFO)


def _descriptor(stream) -> int:
    """Of a stream, or of the process's stderr where it has none (a notebook)."""
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return 2


def say(text: object) -> None:
    """A line on stderr about a decision that was taken; of several processes the first speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)
