"""One Markdown table of how the tokens that were kept meet the boxes of their questions.

python -m llava.eval.mask_report A.jsonl B.jsonl ...

The files are answers of `model_vqa_viscot` (with or without `--do-func-name glimpse`), one for each
set. Precision, recall, F1 and IoU are from tokens summed over a file, the shares kept and inside
the boxes are means over its questions; the last row is the plain mean over the files, of every run
where a set comes twice. The last line is the same as JSON.
"""

import json
import os
import sys

from llava.errors import errors_as_messages
from llava.eval import markdown
from llava.eval.files import box_counts
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.answer_places import around_answers, runs_of
from llava.program_parser import ProgramParser

COLUMNS = {
    "precision": "mPrecision",
    "recall": "mRecall",
    "F1": "mF1",
    "IoU": "mIoU",
    "kept": "mRatio",
    "inside boxes": "inBoxes",
}


def summaries(paths: list[str], where_known: bool = False) -> dict[str, dict]:
    """Name of each file's set -> `box_counts.summarize`, and of several their "mean". Where a set
    comes twice, its run (`runs_of`) stands in front, and every run has its own mean.

    where_known: a file that says nothing of boxes is named on stderr and left out
    Raises ValueError when a file says nothing of boxes.
    """
    known: dict[str, dict] = {}
    for path in paths:
        own = box_counts.summarize(read_answers(path))
        if own is None:
            reason = (
                f"{path}: no answer says how its tokens meet boxes; they do where the questions "
                "have boxes, as those of Visual-CoT (llava.eval.model_vqa_viscot), and where the "
                "method's tokens have a place in the image"
            )
            if not where_known:
                raise ValueError(reason)
            print(f"note: {reason}", file=sys.stderr)
            continue
        known[path] = own
    several = len(set(map(set_name, known))) < len(known)
    by_run: dict[str, dict[str, dict]] = {}
    for (path, own), its in zip(known.items(), runs_of(list(known)), strict=True):
        run = f"{its}, " if several else ""
        by_run.setdefault(run, {})[set_name(path)] = own
    found = {}
    for run, sets in by_run.items():
        if len(sets) > 1:
            sets["mean"] = mean_of(list(sets.values()))
        found |= {run + name: own for name, own in sets.items()}
    return found


def mean_of(sets: list[dict]) -> dict:
    mean = {key: sum(own[key] for own in sets) / len(sets) for key in COLUMNS.values()}
    return {**mean, "count": sum(own["count"] for own in sets)}


def set_name(path: str) -> str:
    """The folder behind `answers` in a path as the scripts write it, else the name of the file."""
    around = around_answers(path)
    return around[2] if around else os.path.splitext(os.path.basename(path))[0]


def table(found: dict[str, dict]) -> str:
    rows = [
        (name, str(own["count"]), *(f"{100 * own[key]:.1f} %" for key in COLUMNS.values()))
        for name, own in found.items()
    ]
    return markdown.table(("set", "questions", *COLUMNS), rows, "lr")


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("files", nargs="+", help="answers files")
    parser.add_argument(
        "--where-known",
        action="store_true",
        help="leave out files that say nothing of boxes, as those of methods whose tokens have no "
        "place in the image",
    )
    args = parser.parse_args()
    found = summaries([os.path.expanduser(path) for path in args.files], args.where_known)
    if found:
        print(table(found))
        print(json.dumps(found))


if __name__ == "__main__":
    main()
