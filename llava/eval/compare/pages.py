"""The page of one model and its pictures, from the numbers that lie beside it.

`llava.eval.compare --page` and `llava.eval.compare.gallery --pages` write it by this, so that a
page can be written again without answering a question: when a plot, a sentence, or the literature's
numbers change.
"""

from __future__ import annotations

from pathlib import Path

from llava.eval.compare.comparison import Comparison
from llava.eval.compare.plot import plot
from llava.eval.compare.published import published_table, read_published
from llava.eval.compare.report import by_hand, markdown, page

#: what is drawn over what
AXES = ("tokens", "flops", "time")


def origin(page_file: str, command: str, published: str | None, highlight: list | None) -> dict:
    """What a page needs beside the numbers; `write` finds it in the settings of a comparison.

    published: model of the literature that is put beside ours; None: none is
    highlight: methods in colour; None: `llava.eval.compare.plot.leaders`
    """
    own = {"file": Path(page_file).name, "command": command}
    return {"page": own | {"published": published, "highlight": highlight}}


def text(comparison: Comparison, docs: Path) -> str:
    """The page; what was written by hand in the one that lies in `docs` stays."""
    about = comparison.settings["page"]
    body = markdown(comparison)
    if about["published"]:
        body += "\n" + published_table(comparison, read_published(), about["published"])
    whole = page(body, pictures(comparison), about["command"], comparison.settings["model_name"])
    return whole + by_hand(str(docs / about["file"]))


def pictures(comparison: Comparison) -> dict[str, str]:
    """Names of the pictures by what they are drawn over."""
    stem = Path(comparison.settings["page"]["file"]).stem.lower()
    return {axis: f"{stem}_{axis}.png" for axis in AXES}


def write(comparison: Comparison, docs: Path) -> Path:
    """Writes the page into the folder `docs`, and its pictures into `images` beside that."""
    about = comparison.settings["page"]
    images = docs.resolve().parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    for axis, name in pictures(comparison).items():
        plot(comparison, axis, str(images / name), about["highlight"])
    file = docs / about["file"]
    file.write_text(text(comparison, docs), encoding="utf-8")
    return file
