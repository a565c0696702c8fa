"""GQA: exact-match accuracy over balanced questions, with the official break-downs.

python -m llava.eval.eval_gqa --tier testdev_balanced --path DIR

Validity, plausibility, consistency and grounding need files that the test-development split does
not have; the first two are computed when `--choices` is given and otherwise reported as 0, as the
official script does.
"""

import argparse
import os
from collections import Counter, defaultdict

from llava.eval.errors import errors_as_messages
from llava.eval.tasks import read_json

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


def evaluate(questions: dict, predictions: list[dict], choices: dict | None = None) -> dict:
    """Returns the scores (percent) of `[{"questionId", "prediction"}]` on balanced questions."""
    given = {entry["questionId"]: entry["prediction"] for entry in predictions}
    balanced = {key: q for key, q in questions.items() if q["isBalanced"]}
    if missing := balanced.keys() - given.keys():
        raise ValueError(f"{len(missing)} questions lack a prediction, e.g. {next(iter(missing))}")
    right = {key: given[key] == q["answer"] for key, q in balanced.items()}
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

    def read(name):
        return read_json(os.path.join(args.path, name.format(tier=args.tier)))

    choices = read(args.choices) if args.choices else None
    print(report(evaluate(read(args.questions), read(args.predictions), choices)), end="")


if __name__ == "__main__":
    main()
