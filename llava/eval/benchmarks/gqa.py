"""GQA: exact-match accuracy over balanced questions, with the official break-downs.

python -m llava.eval.benchmarks.gqa --tier testdev_balanced --path DIR

Validity, plausibility, consistency and grounding need files that the test-development split does
not have; the first two are computed when `--choices` is given and otherwise reported as 0, as the
official script does.
"""

import os
import sys
from collections import Counter, defaultdict

from llava.errors import broken_files_named, errors_as_messages
from llava.eval.benchmarks.benchmark import BUNDLE, Benchmark
from llava.eval.files.matching import (
    check_known,
    keyed,
    source,
    texts_by_id,
    unique,
)
from llava.eval.files.records import Records, as_int, read_json, read_json_list
from llava.eval.scoring.units import Unit, Units
from llava.program_parser import ProgramParser

QUESTIONS = "gqa/data/testdev_balanced_questions.json"
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


def predictions_of(answers: list[dict]) -> list[dict]:
    """Returns `[{"questionId", "prediction"}]`: trailing periods removed, lower case."""
    lines = (
        {"questionId": answer["question_id"], "prediction": answer["text"].rstrip(".").lower()}
        for answer in unique(answers).values()
    )
    return Records(source(answers), lines)


def given_answers(predictions: list[dict]) -> dict[int | str, str]:
    """Returns the predictions by question id; ValueError when two to one question differ."""
    lines = [{"question_id": p["questionId"], "text": p["prediction"]} for p in predictions]
    given = texts_by_id(Records(source(predictions), lines))
    return {key: text.strip().rstrip(".") for key, text in given.items()}


def units(
    questions: dict,
    predictions: list[dict],
    choices: dict | None = None,
    texts: dict | None = None,
) -> Units:
    """Returns whether every balanced question was answered right, in the official break-downs.

    choices: valid and plausible answers per question
    texts:   the answers word for word, by question id
    Raises ValueError when a question has no prediction, or two that differ.
    """
    given = given_answers(predictions)
    balanced = {key: q for key, q in keyed(questions).items() if q["isBalanced"]}
    if missing := [key for key in balanced if key not in given]:
        raise ValueError(
            f"{source(predictions)}: {len(missing)} questions lack a prediction, e.g. {missing[0]}"
        )
    said = texts or given
    found = [
        Unit(key, given[key] == q["answer"], said[key], groups=_groups(q))
        for key, q in balanced.items()
    ]
    choices = keyed(choices) if choices else None
    details = {
        "validity": _share_listed(balanced, given, choices, "valid"),
        "plausibility": _share_listed(balanced, given, choices, "plausible"),
        "distribution": distribution(balanced, given),
    }
    return Units(found, details=details)


def _groups(question: dict) -> tuple[str, ...]:
    is_open = question["types"]["structural"] == "query"
    breakdowns = (f"{name}: {of(question)}" for name, of in BREAKDOWNS.items())
    return "open" if is_open else "binary", *breakdowns


def _share_listed(questions: dict, given: dict, choices: dict | None, kind: str) -> float:
    listed = [given[key] in choices[key][kind] for key in questions] if choices else []
    return 100 * sum(listed) / len(listed) if listed else 0.0


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


def report(units: Units) -> str:
    parts, details = units.by_group(), units.details
    percents = {name: parts[name].percent if name in parts else 0.0 for name in ("binary", "open")}
    percents |= {"accuracy": units.percent}
    percents |= {name: details[name] for name in ("validity", "plausibility")}
    lines = [f"{name.capitalize()}: {value:.2f}%" for name, value in percents.items()]
    lines.append(f"Distribution: {details['distribution']:.2f} (lower is better)")
    for name in BREAKDOWNS:
        keys = (key.partition(": ") for key in parts)
        own = {as_int(k): parts[f"{name}: {k}"] for kind, _, k in keys if kind == name}
        lines += ["", f"Accuracy / {name}:"]
        lines += [f"  {k}: {own[k].percent:.2f}% ({own[k].count} questions)" for k in sorted(own)]
    return "\n".join(lines) + "\n"


def read_units(data_dir: str, asked: Records, answers: list[dict]) -> Units:
    """Of those questions that were answered."""
    truth = keyed(read_json(os.path.join(data_dir, QUESTIONS)))
    check_known(answers, truth, "the questions of GQA")
    texts = texts_by_id(answers)
    return units({key: truth[key] for key in texts}, predictions_of(answers), texts=texts)


BENCHMARKS = (
    Benchmark(
        "gqa",
        "gqa/llava_gqa_testdev_balanced.jsonl",
        "gqa/data/images",
        "accuracy",
        {
            "gqa/llava_": BUNDLE,
            "gqa/data": (
                "https://cs.stanford.edu/people/dorarad/gqa/download.html (questions, images)"
            ),
        },
        read_units,
        report,
        truth=(QUESTIONS,),
    ),
)


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("--tier", default="testdev_balanced", help="part of GQA that was asked")
    parser.add_argument("--path", default=".", help="folder of the question and prediction files")
    parser.add_argument(
        "--questions", default="{tier}_questions.json", help="file of the questions"
    )
    parser.add_argument(
        "--predictions", default="{tier}_predictions.json", help="file of the answers"
    )
    parser.add_argument("--choices", help="valid and plausible answers per question (optional)")
    args = parser.parse_args()

    def place(name):
        return os.path.join(args.path, name.format(tier=args.tier))

    path, truth = place(args.predictions), [place(args.questions)]
    truth += [place(args.choices)] if args.choices else []
    questions, *choices = map(read_json, truth)
    predictions = read_json_list(path, ("questionId", "prediction"))
    with broken_files_named(truth, path):
        found = units(questions, predictions, *choices)
    if strays := given_answers(predictions).keys() - keyed(questions).keys():
        print(
            f"note: {path}: {len(strays)} predictions to no question are left out, such as "
            f"{min(strays, key=str)!r}",
            file=sys.stderr,
        )
    print(report(found), end="")


if __name__ == "__main__":
    main()
