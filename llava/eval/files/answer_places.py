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


def runs_of(paths: list[str]) -> list[str]:
    """`run_of` each, where files of one run are to be told from those of others; all paths without
    their endings where two files with the same name would not be."""
    names = {(run_of(path), *(around_answers(path) or ())[1:]) for path in paths}
    if len(names) < len(set(map(os.path.abspath, paths))):
        return [os.path.splitext(path)[0].removesuffix(".score") for path in paths]
    return list(map(run_of, paths))


def run_of(path: str) -> str:
    """What a file of answers or their score is of, without its ending: the part of its path behind
    `answers/QUESTIONS`, as the scripts write it, else all of it."""
    stem = os.path.splitext(path)[0].removesuffix(".score")
    around = around_answers(path)
    return stem.rpartition(os.sep + around[2] + os.sep)[2] if around else stem
