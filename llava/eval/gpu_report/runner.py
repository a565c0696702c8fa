"""Running steps one after the other: each in a process of its own, with a limit, kept as it comes.

What has been done is in `report.json` after every step. A step that ends with an error, or is
ended, loses nothing of the others; a later call does those that are missing.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llava.eval.gpu_report.steps import Step

DONE, FAILED, ENDED, LEFT_OUT = "done", "failed", "ended", "not begun"
#: part of a step's limit that it may measure; the rest is for loading and building the model
MEASURING = 0.6
#: how much longer the same steps may take on a CPU, which compiles slowly
SLOWER = 4
#: where the tests on the GPU note one line each, as they go
TESTS_FILE = "GPU_TESTS_FILE"
#: what must be the same for results to stand on one page
SAME = ("device", "packages", "cuda")


@dataclass
class Report:
    """What is known, as in `report.json`.

    machine: see `llava.eval.gpu_report.machine`
    steps:   name -> `status`, `seconds`, `reason` where it is not done, `result` of its program
    """

    folder: Path
    small: bool
    machine: dict = field(default_factory=dict)
    steps: dict[str, dict] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return self.folder / "report.json"

    def read(self) -> None:
        """Takes over what an earlier call has done. Raises ValueError where that was another
        machine, or the other kind of run."""
        if not self.file.exists():
            return
        before = json.loads(self.file.read_text(encoding="utf-8"))
        other = [key for key in SAME if before["machine"].get(key) != self.machine.get(key)]
        other += ["small"] * (before["small"] != self.small)
        if other:
            raise ValueError(
                f"{self.folder} holds a report of something else ({', '.join(other)} differ): "
                "--overwrite begins anew, --out writes to another folder"
            )
        self.steps = before["steps"]

    def write(self) -> None:
        content = {"small": self.small, "machine": self.machine, "steps": self.steps}
        path = self.file.with_suffix(".tmp")
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(path, self.file)


def run_program(words: list[str], log: Path, limit: float, **environment: str) -> int | None:
    """Runs `python WORDS` with its output in `log`; its exit status, None where it was ended after
    `limit` seconds, with all that it had started."""
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no output")


def whole(texts: Iterable[str]) -> list:
    """The values of JSON texts, but for one that a program was ended in the middle of."""
    found = []
    for text in texts:
        with suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found


def run_step(step: Step, report: Report, left: float) -> dict:
    """The entry of a step in the report; left: seconds that it may take at most."""
    if left < step.least:
        reason = f"{max(left, 0):.0f} seconds were left, it needs {step.least:.0f}"
        return {"status": LEFT_OUT, "seconds": 0, "reason": reason}
    limit = min(SLOWER * step.limit if report.small else step.limit, left)
    result, log = (report.folder / f"{step.name}.{kind}" for kind in ("json", "log"))
    lines = report.folder / f"{step.name}.jsonl"
    for path in (result, lines):
        path.unlink(missing_ok=True)
    words = step.words(str(result), MEASURING * limit, report.small)
    start = time.monotonic()
    status = run_program(words, log, limit, **{TESTS_FILE: str(lines)})
    entry = {
        "status": DONE if status == 0 else ENDED if status is None else FAILED,
        "seconds": round(time.monotonic() - start, 1),
        "command": " ".join(["python", *step.words("FILE", MEASURING * limit, report.small)]),
    }
    if status is None:
        entry["reason"] = f"ended after {limit:.0f} seconds; its last words: {last_line(log)}"
    elif status:
        entry["reason"] = f"exit status {status}: {last_line(log)}"
    if result.exists() and (found := whole([result.read_text(encoding="utf-8")])):
        entry["result"] = found[0]
    if lines.exists():
        entry["tests"] = whole(lines.read_text(encoding="utf-8").splitlines())
    return entry


def run_steps(steps: list[Step], report: Report, budget: float, after=lambda report: None) -> None:
    """Runs the steps that are not done yet, within `budget` seconds altogether.

    after: called with the report after every step
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the step, too
    end = time.monotonic() + budget
    for number, step in enumerate(steps, 1):
        head = f"step {number} of {len(steps)}, {step.name}"
        if report.steps.get(step.name, {}).get("status") == DONE:
            print(f"{head}: done before", flush=True)
            continue
        print(f"{head}: {step.what}", flush=True)
        entry = run_step(step, report, end - time.monotonic())
        report.steps[step.name] = entry
        reason = f" ({entry['reason']})" if "reason" in entry else ""
        print(f"    {entry['status']}, {entry['seconds']:.0f} s{reason}", flush=True)
        report.write()
        after(report)
