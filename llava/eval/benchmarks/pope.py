"""POPE: does the model see objects that are not there? F1 per category and their mean.

python llava/eval/eval_pope.py --annotation-dir coco --question-file Q.jsonl --result-file A.jsonl
"""

import argparse
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Container
from typing import NamedTuple

from llava.errors import broken_files_named, errors_as_messages
from llava.eval.files.answer_lines import read_answers
from llava.eval.files.matching import by_id, check_known, question_id, say_missing, source, unique
from llava.eval.files.records import complete, read_jsonl

FIELDS = ("question_id", "image", "text", "category")
ANNOTATION_NAME = re.compile(r"coco_pope_(.+)\.json")
RULE = "=" * 36


class Outcome(NamedTuple):
    """An answer and its label, and the image they are about."""

    image: str
    said: bool
    label: bool


def is_yes(text: str) -> bool:
    """Reads an answer as the benchmark does: anything without the plain word "no" is a yes."""
    words = text.strip().split(".")[0].replace(",", "").split(" ")
    return not any(word in ("No", "not", "no") for word in words)


def outcomes(
    annotation_dir: str, questions: list[dict], answers: list[dict]
) -> dict[str, list[Outcome]]:
    """Returns every answered question of the categories that have a label file, by category.

    Labels belong to questions by image and text, answers to questions by id: today's label files
    hold other questions in another order than those of the question file. Raises ValueError when a
    question has no label, and when an answer has no question.
    """
    asked = by_id(questions)
    check_known(answers, asked, source(questions))
    given = defaultdict(list)
    for key, answer in unique(answers).items():
        given[asked[key]["category"]].append((asked[key], is_yes(answer["text"])))
    found = {}
    for category, path in annotation_files(annotation_dir).items():
        labels = read_labels(path)
        _check_labelled(path, labels, [question for question, _ in given[category]])
        found[category] = [
            Outcome(image_and_text(question)[0], said, labels[image_and_text(question)])
            for question, said in given[category]
        ]
    return found


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


def evaluate(annotation_dir: str, questions: list[dict], answers: list[dict]) -> dict:
    """Returns `{"score", "count", "categories": {name: metrics}, "unlabelled"}`.

    score:      mean F1 in percent
    questions:  with `image`, `text` and `category`
    unlabelled: answered categories without a label file, which the mean lacks
    Raises ValueError as `outcomes` does.
    """
    num_questions = Counter(question["category"] for question in questions)
    categories = {
        category: metrics([(one.said, one.label) for one in found])
        | {"num_answers": len(found), "complete": len(found) == num_questions[category]}
        for category, found in outcomes(annotation_dir, questions, answers).items()
    }
    scores = [result["f1"] for result in categories.values() if result["num_answers"]]
    mean = sum(scores) / len(scores) if scores else 0.0
    return {
        "score": 100 * mean,
        "count": sum(result["num_answers"] for result in categories.values()),
        "categories": categories,
        "unlabelled": _unlabelled(questions, answers, categories),
    }


def _unlabelled(questions: list[dict], answers: list[dict], labelled: Container[str]) -> list[str]:
    asked = by_id(questions)
    answered = {asked[question_id(answer)]["category"] for answer in answers}
    return sorted(category for category in answered if category not in labelled)


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
    questions = complete(read_jsonl(args.question_file), FIELDS)
    answers = read_answers(args.result_file)
    with broken_files_named((args.question_file, args.annotation_dir), args.result_file):
        result = evaluate(args.annotation_dir, questions, answers)
    scored = [q for q in questions if q["category"] in result["categories"]]
    if lost := result["unlabelled"]:
        print(
            f"note: {args.annotation_dir} has no labels of {', '.join(lost)}, which are left out",
            file=sys.stderr,
        )
    say_missing(answers, [question_id(q) for q in scored], "the rates are those of the others")
    print(report(result), end="")


if __name__ == "__main__":
    main()
