"""Logs that cannot be written cost lines and nothing else; what is written is one line a record."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from llava import log_output, utils
from llava.log_output import DailyFile, LineHandler, RawOutput, Unfailing
from llava.serve import demo
from llava.serve.service import log_failure
from llava.serve.web.log import ConversationLog
from tests.paths import ROOT
from tests.ports import free_port
from tests.serve.serve_tools import START_SECONDS, wait_for

FULL = Path("/dev/full")
needs_full_device = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


class Disk:
    """A place for lines that has `room` bytes left."""

    def __init__(self, room: int = 10**6):
        self.room, self.data = room, b""

    def write(self, data: bytes) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = bytes(data[: self.room])
        self.data, self.room = self.data + taken, self.room - len(taken)
        return len(taken)

    @property
    def lines(self) -> list[str]:
        return [line.split(" | ", 3)[-1] for line in self.data.decode().splitlines()]


@pytest.fixture
def handler():
    """handler(disk, ...) -> (its handler, a logger that writes to it)."""
    made = []

    def make(disk, **options):
        logger = logging.getLogger(f"tests.logs.{len(made)}")
        logger.propagate, logger.level = False, logging.INFO
        made.append((logger, LineHandler(disk, **options)))
        logger.addHandler(made[-1][1])
        return made[-1][1], logger

    yield make
    for logger, handler in made:
        logger.removeHandler(handler)


def written(handler: LineHandler, disk: Disk) -> list[str]:
    wait_for(lambda: handler._done == handler._accepted)
    return disk.lines


# --- A place without room


def test_lines_without_room_are_counted_in_one_line_once_there_is_room(handler):
    disk = Disk()
    lines, logger = handler(disk)
    logger.info("before")
    assert written(lines, disk) == ["before"]
    disk.room = 0
    for number in range(7):
        logger.info("lost %s", number)
    assert written(lines, disk) == ["before"] and lines.lost == 7
    disk.room = 10**6
    logger.info("after")
    assert written(lines, disk)[1:] == [
        "7 lines are lost here: there was no room, or they were too many",
        "after",
    ]
    assert lines.lost == 0


def test_the_end_of_the_room_tears_one_line_and_not_the_next(handler):
    disk = Disk(room=45)
    lines, logger = handler(disk)
    logger.info("x" * 100)
    assert written(lines, disk) and lines.lost == 1
    disk.room = 10**6
    logger.info("after")
    torn, note, after = written(lines, disk)
    assert "x" in torn and note.startswith("1 lines are lost") and after == "after"


def test_a_place_that_does_not_read_keeps_nobody_waiting(handler, monkeypatch):
    monkeypatch.setattr(log_output, "WAITING_LINES", 100)
    monkeypatch.setattr(log_output, "LAST_SECONDS", 0.2)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)  # nothing more fits into the pipe
    os.set_blocking(writer, True)
    try:
        lines, logger = handler(RawOutput(writer))
        for number in range(2000):
            logger.info("%s", number)
        assert lines.lost > 1000
        lines.flush()  # returns, although the lines are not out
    finally:
        os.close(reader)  # the thread's write ends with an error
        os.close(writer)


def test_lines_beyond_the_number_for_a_minute_are_dropped(handler, monkeypatch):
    now = [600.0]
    monkeypatch.setattr(log_output.time, "monotonic", lambda: now[0])
    disk = Disk()
    lines, logger = handler(disk, per_minute=3)
    for number in range(10):
        logger.info("line %s", number)
    assert lines.lost == 7
    now[0] += 60
    logger.info("later")
    while lines._done < lines._accepted:
        time.sleep(0.01)
    assert disk.lines[:3] == ["line 0", "line 1", "line 2"] and disk.lines[4] == "later"
    assert disk.lines[3].startswith("7 lines are lost")


def test_a_full_disk_at_the_start_is_no_reason_to_stop(handler, tmp_path, monkeypatch):
    def no_room(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(DailyFile, "_open", no_room)
        lines, logger = handler(DailyFile(tmp_path / "logs" / "x.log"))
        logger.info("lost")
        wait_for(lambda: lines.lost == 1)
    logger.info("after")
    wait_for(lambda: lines._done == 2)
    assert "after" in (tmp_path / "logs" / "x.log").read_text()
    with pytest.raises(OSError):  # a mistake is said at once
        DailyFile(Path(__file__) / "x.log")


def test_a_day_that_cannot_begin_a_file_goes_on_in_the_old_one(tmp_path, monkeypatch):
    file = DailyFile(tmp_path / "x.log")
    file.write(b"one\n")
    file.rolloverAt = 0

    def refuse(*_):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(file, "rotate", refuse)
    file.write(b"two\n")
    assert (tmp_path / "x.log").read_text() == "one\ntwo\n"
    file.close()


class FullStream:
    """A stream that raises whatever is written."""

    def write(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    flush = write


def test_a_handler_that_fails_does_not_log_its_failure_for_ever(monkeypatch):
    """The failure is printed to stderr, which is logged, which fails."""
    monkeypatch.setattr(logging, "raiseExceptions", True)  # as in programs that say nothing else
    logger = logging.getLogger("tests.logs.recursive")
    failing = logging.StreamHandler(FullStream())
    tried = []
    original = failing.emit
    failing.emit = lambda record: (tried.append(record), original(record))
    logger.addHandler(failing)
    logger.propagate = False
    monkeypatch.setattr(sys, "stderr", utils.StreamToLogger(logger, logging.ERROR))
    try:
        logger.error("something")
        assert len(tried) < 200
    finally:
        logger.removeHandler(failing)


def test_printing_to_a_full_disk_is_harmless():
    stream = Unfailing(FullStream())
    print("The page is at ...", file=stream, flush=True)


def test_a_dialogue_without_room_does_not_fail_its_visitor(tmp_path, caplog, monkeypatch):
    log = ConversationLog(tmp_path, texts=True)
    full = ConversationLog(tmp_path / "file" / "x", texts=True)
    (tmp_path / "file").write_text("no folder")
    for _ in range(3):
        full._write({"secret": "swordfish"})
    assert full.lost == 3 and caplog.text.count("dialogues cannot be stored") == 1
    full.folder = tmp_path
    full._write({"a": 1})
    assert "3 dialogues or images could not be stored" in caplog.text and full.lost == 0
    log._write({"a": 2})
    (file,) = tmp_path.glob("*-conv.json")
    assert file.read_text() == '{"a": 1}\n{"a": 2}\n' and "swordfish" not in caplog.text


# --- What a line may hold


@pytest.mark.parametrize(
    "text", ["a\nb", "a\rb", "\x1b[2Ja", "\x00", "\u2028", "\u202ea", "\ud83d"]
)
def test_one_record_is_one_line_of_printable_characters(handler, text):
    disk = Disk()
    lines, logger = handler(disk)
    words = "model %s", (text + "\n2026-01-01 | INFO | forged",)
    # Past the logger: pytest keeps what that is given, and cannot hand on half a character.
    lines.handle(logger.makeRecord("page", logging.INFO, "page.py", 1, *words, None))
    (line,) = written(lines, disk)
    assert line.isprintable() and line.startswith("model ") and len(disk.data.splitlines()) == 1


def fail(value):
    raise ValueError(f"{value} is not in the list")


def test_an_error_is_logged_with_its_place_and_without_its_text(handler, caplog):
    disk = Disk()
    lines, logger = handler(disk)
    try:
        fail("swordfish")
    except ValueError as error:
        logger.exception("failed\nfuture: <Task exception=%r>", error)
        log_failure(error, "r1")
    (line,) = written(lines, disk)
    assert line.startswith("failed: ValueError at test_logs.py:") and line.endswith(" fail")
    (record,) = [record for record in caplog.records if record.name == "llava.serve.service"]
    assert record.getMessage().startswith("request r1: ValueError at test_logs.py:")
    assert "swordfish" not in line + record.getMessage() and "\n" not in record.getMessage()


def test_a_traceback_that_was_made_a_text_loses_its_values(handler):
    import traceback

    disk = Disk()
    lines, logger = handler(disk)
    try:
        fail("swordfish")
    except ValueError:
        logger.error(traceback.format_exc())  # as uvicorn does for its start and end
    (line,) = written(lines, disk)
    assert line.startswith("ValueError at test_logs.py:") and "swordfish" not in line


def test_arguments_that_do_not_fit_cost_a_line_and_not_the_program(handler):
    disk = Disk()
    lines, _ = handler(disk)
    lines.handle(logging.LogRecord("x", logging.INFO, "", 1, "%d workers", ("many",), None))
    (line,) = written(lines, disk)
    assert "cannot be formatted" in line


# --- Programs


@contextmanager
def program(*arguments, **options):
    command = [sys.executable, "-m", *map(str, arguments)]
    running = subprocess.Popen(command, cwd=ROOT, **options)
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def stops(running) -> bool:
    running.send_signal(signal.SIGTERM)
    return running.wait(120) in (0, -signal.SIGTERM)


def ask_often(address: str, times: int = 50) -> None:
    """Requests that each have a line written."""
    with httpx.Client(base_url=address, timeout=60) as client:
        for _ in range(times):
            assert client.post("/nothing").status_code == 404
        assert client.post("/list_models").json() == {"models": []}


@contextmanager
def controller(*arguments, **options):
    """(process, address) of a controller that answers."""
    port = free_port()
    where = ("--host", "127.0.0.1", "--port", port)
    with program("llava.serve.controller", *where, *arguments, **options) as running:
        wait_for(lambda: demo.is_listening("127.0.0.1", port), seconds=START_SECONDS)
        yield running, f"http://127.0.0.1:{port}"


@needs_full_device
def test_a_controller_whose_logs_have_no_room_answers_and_stops(tmp_path):
    (tmp_path / "controller.log").symlink_to(FULL)
    with FULL.open("w") as full:
        with controller("--log-dir", tmp_path, stdout=full, stderr=full) as (running, address):
            ask_often(address)
            assert stops(running)


def test_a_controller_whose_log_nobody_reads_answers_and_stops():
    reader, writer = os.pipe()
    try:
        while True:  # until there is no more room in it
            os.set_blocking(writer, False)
            os.write(writer, bytes(512))
    except BlockingIOError:
        os.set_blocking(writer, True)
    try:
        with controller(stdout=writer, stderr=writer) as (running, address):
            ask_often(address)
            assert stops(running)
    finally:
        os.close(reader)
        os.close(writer)


def test_lines_are_written_again_when_there_is_room(tmp_path):
    """On a small disk of its own, where the machine lets a test mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount program")
    if done.returncode:
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
    try:
        ballast = small / "ballast"
        with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with controller("--log-dir", small) as (running, address):
            ask_often(address)
            ballast.unlink()
            ask_often(address, 1)
            log = small / "controller.log"
            wait_for(lambda: "lines are lost here" in log.read_text())
            wait_for(lambda: log.read_text().count("unknown_endpoint") == 1)
            assert log.read_text().count("lines are lost here") == 1
            assert stops(running)
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.slow
@needs_full_device
def test_a_page_whose_output_has_no_room_answers_and_stops():
    pytest.importorskip("gradio")
    port = free_port()
    with FULL.open("w") as full:
        arguments = ("llava.serve.gradio_web_server", "--port", port)
        with program(*arguments, stdout=full, stderr=full) as running:
            wait_for(lambda: demo.is_listening("127.0.0.1", port), seconds=START_SECONDS)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                for _ in range(50):
                    assert client.get("/nothing").status_code == 404
                assert client.get("/").status_code == 200
            assert running.poll() is None and stops(running)


@pytest.mark.slow
@needs_full_device
def test_a_worker_whose_logs_have_no_room_answers(tmp_path):
    (tmp_path / "model_worker_x.log").symlink_to(FULL)
    port = free_port()
    code = (
        "import sys\n"
        "from llava.serve import model_worker\n"
        "from tests.serve.serve_tools import Words\n"
        "model_worker.new_request_id = lambda: 'x'\n"
        "model_worker.run_worker(model_worker.build_parser().parse_args(), lambda args: Words())\n"
    )
    line = ["--port", str(port), "--no-register", "--log-dir", str(tmp_path)]
    with FULL.open("w") as full:
        running = subprocess.Popen(
            [sys.executable, "-c", code, *line], cwd=ROOT, stdout=full, stderr=full
        )
        try:
            wait_for(lambda: demo.is_listening("127.0.0.1", port), seconds=START_SECONDS)
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                for _ in range(50):
                    assert client.post("/nothing").status_code == 404
                assert client.post("/worker_get_status").json()["queue_length"] == 0
            assert stops(running)
        finally:
            running.kill()
            running.wait()
