"""Files beside an answers file that say something of its answers: what they are worth, and which
tokens were kept. They are worth nothing once the answers are others."""

import glob
import os
import shutil

from llava.eval.files.mask_files import KEPT, REFERENCE

#: endings of names, behind that of the answers file without its own
FILES = ("_info.json", ".score.json")
#: lines with scores, the mean in the name
SCORED = "_*-[01].*.jsonl"


def side_files(answers: str) -> list[str]:
    """Those files and folders of an answers file that are there."""
    stem = os.path.splitext(answers)[0]
    names = [stem + ending for ending in (*FILES, KEPT, REFERENCE)]
    return [*filter(os.path.exists, names), *glob.glob(glob.escape(stem) + SCORED)]


def remove_side_files(answers: str) -> None:
    for name in side_files(answers):
        shutil.rmtree(name) if os.path.isdir(name) else os.remove(name)
