"""POPE: does the model see objects that are not there? F1 per category and their mean.

python llava/eval/eval_pope.py --annotation-dir coco --question-file Q.jsonl --result-file A.jsonl
"""

import argparse
import os
import re
import sys
from typing import NamedTuple

from llava.eval.answer_lines import read_answers
from llava.eval.errors import errors_as_messages
from llava.eval.tasks import read_jsonl

ANNOTATION_NAME = re.compile(r"coco_pope_(.+)\.json")
RULE = "=" * 36


def is_yes(text: str) -> bool:
    """Reads an answer as the benchmark does: anything without the plain word "no" is a yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not any(word in ("No", "not", "no") for word in words)


class Outcome(NamedTuple):
    """An answer and its label, and the image they are about."""

    image: str
    said: bool
    label: bool


def outcomes(
    annotation_dir: str, questions: list[dict], answers: list[dict]
) -> dict[str, list[Outcome]]:
    """Returns every answered question of the categories that have a label file, by category."""
    texts = {answer["question_id"]: answer["text"] for answer in answers}
    if unknown := texts.keys() - {question["question_id"] for question in questions}:
        raise ValueError(f"{len(unknown)} answers to no question, e.g. {next(iter(unknown))!r}")
    found = {}
    for category, path in annotation_files(annotation_dir).items():
        own = [question for question in questions if question["category"] == category]
        pairs = zip(own, read_labels(path), strict=False)
        found[category] = [
            Outcome(str(q.get("image")), is_yes(texts[q["question_id"]]), label)
            for q, label in pairs
            if q["question_id"] in texts
        ]
    return found


def evaluate(annotation_dir: str, questions: list[dict], answers: list[dict]) -> dict:
    """Returns `{"score": mean F1 in percent, "categories": {name: metrics}}`.

    Labels belong to the questions of a category in file order, answers to questions by id.
    """
    categories = {}
    for category, found in outcomes(annotation_dir, questions, answers).items():
        categories[category] = metrics([(one.said, one.label) for one in found])
        categories[category]["num_answers"] = num_answers = len(found)
        num_labels = len(read_labels(annotation_files(annotation_dir)[category]))
        num_asked = sum(question["category"] == category for question in questions)
        categories[category]["complete"] = num_answers == num_asked == num_labels
    scores = [result["f1"] for result in categories.values() if result["num_answers"]]
    mean = sum(scores) / len(scores) if scores else 0.0
    return {
        "score": 100 * mean,
        "count": sum(result["num_answers"] for result in categories.values()),
        "categories": categories,
    }


def read_labels(path: str) -> list[bool]:
    """True for yes; labels other than yes and no count as yes, as in the reference."""
    return [record["label"] != "no" for record in read_jsonl(path, ("label",))]


def annotation_files(folder: str) -> dict[str, str]:
    matches = (ANNOTATION_NAME.fullmatch(name) for name in sorted(os.listdir(folder)))
    files = {match[1]: os.path.join(folder, match[0]) for match in matches if match}
    if not files:
        raise ValueError(f"{folder} holds no coco_pope_<category>.json")
    return files


def metrics(pairs: list[tuple[bool, bool]]) -> dict:
    """Returns counts and rates of (prediction, label) pairs; a rate over nothing is 0."""
    tp, fp = pairs.count((True, True)), pairs.count((True, False))
    tn, fn = pairs.count((False, False)), pairs.count((False, True))
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    return {
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
        "accuracy": ratio(tp + tn, len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": ratio(tp + fp, len(pairs)),
    }


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def report(result: dict) -> str:
    """Returns the text of the reference scorer, categories in alphabetical order."""
    blocks = [_category_report(*item) for item in result["categories"].items()]
    if len(blocks) > 1:
        blocks.append(f"Average F1 score: {result['score'] / 100}\n")
    return "".join(blocks)


def _category_report(category: str, m: dict) -> str:
    order = ("f1", "accuracy", "precision", "recall", "yes_ratio")
    return (
        f"Category: {category}, # samples: {m['num_answers']}\n"
        f"TP\tFP\tTN\tFN\t\n{m['tp']}\t{m['fp']}\t{m['tn']}\t{m['fn']}\n"
        f"Accuracy: {m['accuracy']}\nPrecision: {m['precision']}\nRecall: {m['recall']}\n"
        f"F1 score: {m['f1']}\nYes ratio: {m['yes_ratio']}\n"
        f"{', '.join(f'{m[key]:.3f}' for key in order)}\n{RULE}\n"
    )


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annotation-dir", required=True)
    parser.add_argument("--question-file", required=True)
    parser.add_argument("--result-file", required=True)
    args = parser.parse_args()
    questions = read_jsonl(args.question_file, ("question_id", "category"))
    answers = read_answers(args.result_file)
    result = evaluate(args.annotation_dir, questions, answers)
    for category, values in result["categories"].items():
        if not values["complete"]:
            print(
                f"warning: {category}: questions, labels and answers differ in number",
                file=sys.stderr,
            )
    print(report(result), end="")


if __name__ == "__main__":
    main()
