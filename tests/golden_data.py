"""Where the recorded reference cases are: beside the repository in full, or the part shipped."""

import json

from tests.paths import GOLDEN as SHIPPED
from tests.paths import ROOT

FULL = ROOT.parent / "shared" / "golden"
GOLDEN = FULL if FULL.is_dir() else SHIPPED


def golden_json(name: str):
    """The content of one recorded JSON file, for example "llava-base/prompts.json"."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))
