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
