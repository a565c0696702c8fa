"""GQA: exact-match accuracy over balanced questions, with the official break-downs.

python -m llava.eval.benchmarks.gqa --tier testdev_balanced --path DIR

Validity, plausibility, consistency and grounding need files that the test-development split does
not have; the first two are computed when `--choices` is given and otherwise reported as 0, as the
official script does.
"""

import argparse
import os
import sys
from collections import Counter, defaultdict

from llava.errors import broken_files_named, errors_as_messages
from llava.eval.files.matching import check_known, keyed, source, unique
from llava.eval.files.records import Records, read_json, read_json_list

# Operations that only turn a found object into an answer are no reasoning step of their own.
FREE_OPERATIONS = ("exist", "query: name", "choose name")
BREAKDOWNS = {
    "structural type": lambda q: q["types"]["structural"],
    "semantic type": lambda q: q["types"]["semantic"],
    "steps number": lambda q: num_steps(q),
    "words number": lambda q: len(q["question"].split()),
}


def num_steps(question: dict) -> int:
    """Returns how many reasoning operations a question takes."""
    operations = [f"{step['operation']}: {step['argument']}" for step in question["semantic"]]
    return sum(not any(free in text for free in FREE_OPERATIONS) for text in operations)


def given_answers(predictions: list[dict]) -> dict[int | str, str]:
    """Returns the predictions by question id; ValueError when two to one question differ."""
    lines = [{"question_id": p["questionId"], "text": p["prediction"]} for p in predictions]
    given = unique(Records(source(predictions), lines))
    return {key: line["text"].strip().rstrip(".") for key, line in given.items()}


def asked(questions: dict, answers: list[dict]) -> dict[int | str, dict]:
    """Returns the questions that were answered; ValueError on an answer to no question."""
    questions = keyed(questions)
    check_known(answers, questions, "the questions of GQA")
    return {key: questions[key] for key in unique(answers)}


def points(questions: dict, predictions: list[dict]) -> dict[int | str, bool]:
    """Returns by question id whether a balanced question was answered right.

    Raises ValueError when one has no prediction, or two that differ.
    """
    given = given_answers(predictions)
    balanced = {key: q for key, q in keyed(questions).items() if q["isBalanced"]}
    if missing := [key for key in balanced if key not in given]:
        raise ValueError(
            f"{source(predictions)}: {len(missing)} questions lack a prediction, e.g. {missing[0]}"
        )
    return {key: given[key] == question["answer"] for key, question in balanced.items()}


def evaluate(questions: dict, predictions: list[dict], choices: dict | None = None) -> dict:
    """Returns the scores (percent) of `[{"questionId", "prediction"}]` on balanced questions."""
    right = points(questions, predictions)
    given, questions = given_answers(predictions), keyed(questions)
    balanced = {key: questions[key] for key in right}
    choices = keyed(choices) if choices else None
    is_open = {key: q["types"]["structural"] == "query" for key, q in balanced.items()}
    accuracy = _percent(right.values())
    return {
        "score": accuracy,
        "count": len(right),
        "binary": _percent(right[key] for key in right if not is_open[key]),
        "open": _percent(right[key] for key in right if is_open[key]),
        "accuracy": accuracy,
        "validity": _share_listed(balanced, given, choices, "valid"),
        "plausibility": _share_listed(balanced, given, choices, "plausible"),
        "distribution": distribution(balanced, given),
        "breakdowns": {name: _breakdown(balanced, right, of) for name, of in BREAKDOWNS.items()},
    }


def _share_listed(questions: dict, given: dict, choices: dict | None, kind: str) -> float:
    if not choices:
        return 0.0
    return _percent(given[key] in choices[key][kind] for key in questions)


def _breakdown(questions: dict, right: dict, of) -> dict:
    groups = defaultdict(list)
    for key, question in questions.items():
        groups[of(question)].append(right[key])
    return {name: (_percent(groups[name]), len(groups[name])) for name in sorted(groups)}


def distribution(questions: dict, given: dict) -> float:
    """Returns how far predicted answers stray from the true ones: chi-square per answer group.

    Groups weigh by their number of questions; the sum is divided by 100.
    """
    true, predicted = defaultdict(Counter), defaultdict(Counter)
    for key, question in questions.items():
        group = question["groups"]["global"]
        if group is not None:
            true[group][question["answer"]] += 1
            predicted[group][given[key]] += 1
    total = sum(answers.total() for answers in true.values())
    chi_square = sum(
        answers.total() * sum((predicted[group][a] - n) ** 2 / n for a, n in answers.items())
        for group, answers in true.items()
    )
    return chi_square / total / 100 if total else 0.0


def _percent(right) -> float:
    right = list(right)
    return 100 * sum(right) / len(right) if right else 0.0


def report(result: dict) -> str:
    names = ("binary", "open", "accuracy", "validity", "plausibility")
    lines = [f"{name.capitalize()}: {result[name]:.2f}%" for name in names]
    lines.append(f"Distribution: {result['distribution']:.2f} (lower is better)")
    for name, groups in result["breakdowns"].items():
        lines += ["", f"Accuracy / {name}:"]
        lines += [f"  {key}: {score:.2f}% ({n} questions)" for key, (score, n) in groups.items()]
    return "\n".join(lines) + "\n"


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", default="testdev_balanced")
    parser.add_argument("--path", default=".", help="folder of the question and prediction files")
    parser.add_argument("--questions", default="{tier}_questions.json")
    parser.add_argument("--predictions", default="{tier}_predictions.json")
    parser.add_argument("--choices", help="valid and plausible answers per question (optional)")
    args = parser.parse_args()

    def place(name):
        return os.path.join(args.path, name.format(tier=args.tier))

    path, truth = place(args.predictions), [place(args.questions)]
    truth += [place(args.choices)] if args.choices else []
    questions, *choices = map(read_json, truth)
    predictions = read_json_list(path, ("questionId", "prediction"))
    with broken_files_named(truth, path):
        result = evaluate(questions, predictions, *choices)
    if strays := given_answers(predictions).keys() - keyed(questions).keys():
        print(
            f"note: {path}: {len(strays)} predictions to no question are left out, such as "
            f"{min(strays, key=str)!r}",
            file=sys.stderr,
        )
    print(report(result), end="")


if __name__ == "__main__":
    main()
