"""Mean scores of review files: candidate as percent of the reference, and both times ten.

python -m llava.eval.summarize_gpt_review -f REVIEW.jsonl [MORE.jsonl ...]
python -m llava.eval.summarize_gpt_review -d FOLDER [-v 0314] [-s WORD ...] [-i QUESTION ...]

The LLaVA-Bench number is the first value of `all`.
"""

import json
import os
import sys
from collections import defaultdict

import numpy as np

from llava.errors import errors_as_messages
from llava.eval.files.records import read_jsonl
from llava.eval.scoring.judge import CACHE_NAME
from llava.program_parser import ProgramParser

PREFIX = "gpt4_text_"
RULE = "=" * 33


def find_files(folder: str, words: list[str]) -> list[str]:
    """Returns the review files of a folder whose names hold all `words`. Raises ValueError when
    there are none."""
    in_reviews = "review" in os.path.basename(os.path.abspath(folder))
    starts = ("gpt4_text", "reviews_", "review_")
    names = [
        name
        for name in os.listdir(folder)
        if name.endswith(".jsonl") and (in_reviews or name.startswith(starts))
        if name != CACHE_NAME and all(word in name for word in words)
    ]
    if not names:
        raise ValueError(
            f"{folder} holds no reviews, which are *.jsonl in a folder called review..., and "
            f"{', '.join(f'{start}*.jsonl' for start in starts)} elsewhere"
            + (f", with {' and '.join(words)} in their names" if words else "")
        )
    return [os.path.join(folder, name) for name in names]


def config_name(path: str) -> str:
    return os.path.basename(path).replace(PREFIX, "").removesuffix(".jsonl")


def judge_version(path: str) -> str:
    return "0613" if "0613" in config_name(path) else "0314"


def summarize(reviews: list[dict], ignored: tuple = ()) -> tuple[dict, int]:
    """Returns (reference, candidate) means by category and `all`, and how many had no scores.

    A line that stands there twice counts once.
    """
    groups, unreadable = defaultdict(list), 0
    for record in {json.dumps(record): record for record in reviews}.values():
        if record["question_id"] in ignored:
            continue
        scores = _scores(record)
        if -1 in scores:
            unreadable += 1
            continue
        groups["all"].append(scores)
        if "category" in record:
            groups[record["category"]].append(scores)
    means = {name: np.asarray(rows, float).mean(axis=0).round(3) for name, rows in groups.items()}
    return {name: tuple(means[name].tolist()) for name in sorted(means)}, unreadable


def _scores(record: dict) -> list[float]:
    """The two scores of a review; ValueError says where there is something else."""
    scores = record.get("tuple", record.get("score"))
    pair = scores if isinstance(scores, list | tuple) else ()
    numbers = [n for n in pair if isinstance(n, int | float) and not isinstance(n, bool)]
    if len(pair) != 2 or len(numbers) != 2 or not isinstance(record.get("category", ""), str):
        where = getattr(record, "where", "") or f"question {record['question_id']!r}"
        raise ValueError(f"{where}: no review with two scores")
    return numbers


def relative(reference: float, candidate: float) -> float:
    """Candidate in percent of the reference."""
    return 100 * candidate / reference if reference else 0.0


def report(means: dict) -> str:
    lines = [
        f"{name} {round(relative(one, two), 1)} {round(10 * one, 1)} {round(10 * two, 1)}\n"
        for name, (one, two) in means.items()
    ]
    return "".join(lines)


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("-d", "--dir", help="folder of review files")
    parser.add_argument(
        "-v",
        "--version",
        choices=("0314", "0613"),
        help="reviews by this version of the judge alone",
    )
    parser.add_argument(
        "-s", "--select", nargs="*", default=[], help="words that the names of all files must have"
    )
    parser.add_argument(
        "-f", "--files", nargs="*", default=[], help="review files, in place of a folder"
    )
    parser.add_argument("-i", "--ignore", nargs="*", default=[], help="question ids to leave out")
    args = parser.parse_args()
    if not args.files and not args.dir:
        parser.error("give --files or --dir")
    ignored = {word for key in args.ignore for word in (key, _as_number(key))}
    for path in sorted(args.files or find_files(args.dir, args.select)):
        if args.version in (None, judge_version(path)):
            means, unreadable = summarize(read_jsonl(path, ("question_id",)), tuple(ignored))
            print(f"{config_name(path)}\n{report(means)}{RULE}")
            if unreadable:
                print(f"{path}: {unreadable} replies without scores left out", file=sys.stderr)


def _as_number(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


if __name__ == "__main__":
    main()
