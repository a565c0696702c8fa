"""Progress bars of programs that work for more than some seconds."""

from __future__ import annotations

import os
from collections.abc import Iterable

from tqdm import tqdm

#: seconds after which a bar shows up: what is over sooner needs none
PATIENCE = 5.0


def progress(steps: Iterable | int, label: str, unit: str) -> tqdm:
    """A bar on stderr, where that is a terminal, that goes through `steps`, or is moved on with
    `update` where they are a number. Of several processes the first one shows it."""
    counted = {"total": steps} if isinstance(steps, int) else {"iterable": steps}
    hidden = None if os.environ.get("RANK", "0") == "0" else True  # None: stderr decides
    return tqdm(**counted, desc=label, unit=f" {unit}", delay=PATIENCE, disable=hidden)
