"""Examples of the page: pictures and questions of the playground."""

from __future__ import annotations

import json
from pathlib import Path

from llava.playground import benchmark_dir

#: (question file in the playground's benchmark, line)
CHOSEN = (
    ("gqa/llava_gqa_testdev_balanced.jsonl", 0),
    ("textvqa/llava_textvqa_val_v051_ocr.jsonl", 7),
    ("vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", 40),
    ("describe/questions.jsonl", 12),
)


def examples() -> list[tuple[str, str]]:
    """(image file, question) pairs; none where the playground is not installed."""
    try:
        folder = Path(benchmark_dir())
    except FileNotFoundError:
        return []
    return [_example(folder, name, line) for name, line in CHOSEN]


def _example(folder: Path, name: str, number: int) -> tuple[str, str]:
    line = (folder / name).read_text(encoding="utf-8").splitlines()[number]
    question = json.loads(line)
    lines = question["text"].splitlines()
    text = "\n".join(line for line in lines if not line.startswith("Reference OCR"))
    return str(folder / "images" / question["image"]), text
