"""POPE: does the model see objects that are not there? F1 per category and their mean.

python llava/eval/eval_pope.py --annotation-dir coco --question-file Q.jsonl --result-file A.jsonl
"""

import os
import re
import sys
from collections import defaultdict

import numpy as np

from llava.errors import broken_files_named, errors_as_messages
from llava.eval.benchmarks.benchmark import BUNDLE, COCO, Benchmark
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import (
    by_id,
    check_known,
    question_id,
    say_missing,
    source,
    texts_by_id,
)
from llava.eval.files.records import Records, complete, read_jsonl
from llava.eval.scoring.units import Unit, Units, ratio
from llava.program_parser import ProgramParser

LABELS = "pope/coco"
FIELDS = ("question_id", "image", "text", "category")
ANNOTATION_NAME = re.compile(r"coco_pope_(.+)\.json")
RULE = "=" * 36


def is_yes(text: str) -> bool:
    """Reads an answer as the benchmark does: anything without the plain word "no" is a yes."""
    words = text.strip().split(".")[0].replace(",", "").split(" ")
    return not any(word in ("No", "not", "no") for word in words)


def units(annotation_dir: str, questions: list[dict], answers: list[dict]) -> Units:
    """Returns whether every answer is right, with counts of the right, wrong and missed `yes`; of
    the categories that have a label file. The detail `unlabelled` names the others.

    questions: with `image`, `text` and `category`
    Labels belong to questions by image and text, answers to questions by id: today's label files
    hold other questions in another order than those of the question file. Raises ValueError when a
    question has no label, and when an answer has no question.
    """
    asked = by_id(questions)
    check_known(answers, asked, source(questions))
    given = defaultdict(list)
    for key, text in texts_by_id(answers).items():
        given[asked[key]["category"]].append((key, text))
    found, files = [], annotation_files(annotation_dir)
    for category, path in files.items():
        labels = read_labels(path)
        _check_labelled(path, labels, [asked[key] for key, _ in given[category]])
        for key, text in given[category]:
            image, _ = place = image_and_text(asked[key])
            said, label = is_yes(text), labels[place]
            counts = (said and label, said and not label, label and not said)
            found.append(Unit(key, said == label, text, image, (category,), counts=counts))
    unlabelled = sorted(name for name in given if name not in files)
    scored = Units(found, f1, True, tuple(files))
    scored.details["categories"] = {k: _rates_of(part) for k, part in scored.by_group().items()}
    scored.details["unlabelled"] = unlabelled
    return scored


def image_and_text(record: dict) -> tuple[str, str]:
    """Image and question, without the folder of the one and the instruction below the other."""
    question = record["text"].strip().split("\n")[0]
    return os.path.basename(record["image"]), " ".join(question.split())


def _check_labelled(path: str, labels: dict, questions: list[dict]) -> None:
    if lost := [question for question in questions if image_and_text(question) not in labels]:
        raise ValueError(
            f"{path} belongs to other questions: it has no label for {len(lost)} of the "
            f"{len(questions)} that were answered, such as question {lost[0]['question_id']!r}, "
            f"{image_and_text(lost[0])[1]!r} about {lost[0]['image']}"
        )


def read_labels(path: str) -> dict[tuple[str, str], bool]:
    """Returns by (image, question) whether the right answer is yes."""
    labels = {}
    for number, record in enumerate(read_jsonl(path, ("image", "text", "label")), start=1):
        label = str(record["label"]).strip().lower()
        if label not in ("yes", "no"):
            raise ValueError(f"{path}, label {number}: {record['label']!r} is neither yes nor no")
        if not (isinstance(record["image"], str) and isinstance(record["text"], str)):
            raise ValueError(f"{path}, label {number}: image and text must be texts")
        if labels.setdefault(image_and_text(record), label == "yes") != (label == "yes"):
            raise ValueError(f"{path}, label {number}: the same question is labelled yes and no")
    return labels


def annotation_files(folder: str) -> dict[str, str]:
    matches = (ANNOTATION_NAME.fullmatch(name) for name in sorted(os.listdir(folder)))
    files = {match[1]: os.path.join(folder, match[0]) for match in matches if match}
    if not files:
        raise ValueError(f"{folder} holds no coco_pope_<category>.json")
    return files


def rates(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The rates of (..., 5) sums over answers; a rate over nothing is 0."""
    right, count, tp, fp, fn = np.moveaxis(np.asarray(sums, float), -1, 0)
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    return {
        "accuracy": ratio(right, count),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": ratio(tp + fp, count),
    }


def f1(sums: np.ndarray) -> np.ndarray:
    return 100 * rates(sums)["f1"]


def report(units: Units) -> str:
    """Returns the text of the reference scorer, categories in alphabetical order."""
    parts = units.by_group()
    blocks = [_category_report(*item) for item in parts.items()]
    if len(blocks) > 1:
        scores = [_rates_of(part)["f1"] for part in parts.values() if part.found]
        blocks.append(f"Average F1 score: {sum(scores) / max(len(scores), 1)}\n")
    return "".join(blocks)


def _rates_of(units: Units) -> dict:
    sums = units.sums if units.found else 5 * (0,)
    right, _, tp, fp, fn = sums
    counts = {"tp": tp, "fp": fp, "tn": right - tp, "fn": fn}
    return counts | {name: float(rate) for name, rate in rates(sums).items()}


def _category_report(category: str, units: Units) -> str:
    m = _rates_of(units)
    order = ("f1", "accuracy", "precision", "recall", "yes_ratio")
    return (
        f"Category: {category}, # samples: {units.count}\n"
        f"TP\tFP\tTN\tFN\t\n{m['tp']}\t{m['fp']}\t{m['tn']}\t{m['fn']}\n"
        f"Accuracy: {m['accuracy']}\nPrecision: {m['precision']}\nRecall: {m['recall']}\n"
        f"F1 score: {m['f1']}\nYes ratio: {m['yes_ratio']}\n"
        f"{', '.join(f'{m[key]:.3f}' for key in order)}\n{RULE}\n"
    )


def read_units(data_dir: str, asked: Records, answers: list[dict]) -> Units:
    """Raises ValueError when a category has no labels."""
    folder = os.path.join(data_dir, LABELS)
    found = units(folder, complete(asked, FIELDS), answers)
    if lost := found.details["unlabelled"]:
        raise ValueError(f"{folder} has no labels of {', '.join(lost)}")
    return found


BENCHMARKS = (
    Benchmark(
        "pope",
        "pope/llava_pope_test.jsonl",
        "pope/val2014",
        "F1",
        {
            "pope/llava_": BUNDLE,
            LABELS: "https://github.com/AoiDragon/POPE (output/coco)",
            "pope/val2014": f"{COCO}/val2014.zip",
        },
        read_units,
        report,
        truth=(LABELS,),
    ),
)


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("--annotation-dir", required=True, help="folder of POPE's coco_pope_*.json")
    parser.add_argument("--question-file", required=True, help="file of the questions")
    parser.add_argument("--result-file", required=True, help="answers file")
    args = parser.parse_args()
    questions = complete(read_jsonl(args.question_file), FIELDS)
    answers = read_answers(args.result_file)
    with broken_files_named((args.question_file, args.annotation_dir), args.result_file):
        found = units(args.annotation_dir, questions, answers)
    if lost := found.details["unlabelled"]:
        print(
            f"note: {args.annotation_dir} has no labels of {', '.join(lost)}, which are left out",
            file=sys.stderr,
        )
    scored = [question_id(q) for q in questions if q["category"] in found.groups]
    say_missing(answers, scored, "the rates are those of the others")
    print(report(found), end="")


if __name__ == "__main__":
    main()
