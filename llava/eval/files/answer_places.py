"""Where the scripts put answers files: `DATA_DIR/BENCHMARK/answers/QUESTIONS/CKPT/METHOD/`."""

from __future__ import annotations

import os


def around_answers(path: str) -> tuple[str, str, str] | None:
    """(data folder, folder of the benchmark, split) of the path of an answers file, or None."""
    parts = os.path.abspath(path).split(os.sep)
    places = [n for n, part in enumerate(parts) if part in ("answers", "answers_upload")]
    if not places or places[-1] + 1 >= len(parts) - 1:
        return None
    place = places[-1]
    return os.sep.join(parts[: place - 1]), parts[place - 1], parts[place + 1]


def run_of(path: str) -> str:
    """What a file of answers or their score is of, without its ending: the part of its path behind
    `answers/QUESTIONS`, as the scripts write it, else all of it."""
    stem = os.path.splitext(path)[0].removesuffix(".score")
    around = around_answers(path)
    return stem.rpartition(os.sep + around[2] + os.sep)[2] if around else stem
