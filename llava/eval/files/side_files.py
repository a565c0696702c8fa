"""Files beside an answers file that say something of its answers: what they are worth, and which
tokens were kept. They are worth nothing once the answers are others."""

import glob
import os
import shutil
import sys
from itertools import chain

from llava.eval.files.mask_files import KEPT, REFERENCE

#: endings of names, behind that of the answers file without its own
FILES = ("_info.json", ".score.json")
#: what scores free-form answers, as it stands in the name of the file with the scored lines
SCORERS = ("judge", "precise_match")


def scored_files(answers: str, scorer: str) -> list[str]:
    """Files with the scored lines of an answers file, one of `SCORERS` having scored them; their
    mean is in the name."""
    stem = glob.escape(os.path.splitext(answers)[0])
    return glob.glob(f"{stem}_{scorer}-[01].[0-9][0-9][0-9][0-9].jsonl")


def side_files(answers: str) -> list[str]:
    """Those files and folders of an answers file that are there."""
    stem = os.path.splitext(answers)[0]
    names = [stem + ending for ending in (*FILES, KEPT, REFERENCE)]
    scored = (scored_files(answers, scorer) for scorer in SCORERS)
    return [*filter(os.path.exists, names), *chain.from_iterable(scored)]


def remove_side_files(answers: str) -> None:
    """Removes them, and says on stderr which they were."""
    if found := side_files(answers):
        names = ", ".join(sorted(map(os.path.basename, found)))
        print(f"removed with the old answers of {answers}: {names}", file=sys.stderr)
    for name in found:
        shutil.rmtree(name) if os.path.isdir(name) else os.remove(name)
