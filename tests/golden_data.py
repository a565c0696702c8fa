"""Where the recorded reference cases are: beside the repository in full, or the part shipped."""

import json
from pathlib import Path

SHIPPED = Path(__file__).parent / "golden"
FULL = Path(__file__).parents[2] / "shared" / "golden"
GOLDEN = FULL if FULL.is_dir() else SHIPPED


def golden_json(name: str):
    """The content of one recorded JSON file, for example "llava-base/prompts.json"."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))
