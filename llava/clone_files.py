"""Files of the repository that programs read wherever they run.

In a clone they are where they are. The installed package has copies of those that MANIFEST.in
names, which setup.py makes; everything else, such as the playground's model, is in a clone alone.
"""

from __future__ import annotations

from pathlib import Path

CLONE = Path(__file__).resolve().parents[1]
COPIES = Path(__file__).resolve().parent / "clone"


def clone_file(name: str) -> Path:
    """Where the file `name`, a path in the repository, is. FileNotFoundError where it is not."""
    for folder in (COPIES, CLONE):
        if (path := folder / name).is_file():
            return path
    raise FileNotFoundError(
        f"{CLONE / name} is missing: it comes with a clone of the repository, and with a package "
        "that was built from one"
    )
