"""SEED-Bench: accuracy per question type, and over images and videos.

python -m llava.eval.benchmarks.seed --annotation-file SEED-Bench.json --result-file A.jsonl

`scripts/convert_seed_for_submission.py` prints the same and writes the leaderboard's file, too.
"""

from llava.eval.files.matching import by_id, check_known, keyed, say_missing, unique
from llava.eval.files.records import read_json
from llava.eval.scoring.cli import run_scorer

TOTAL = "Total accuracy"


def points(questions: list[dict], texts: dict) -> dict[int | str, bool]:
    """Returns by question id whether it was answered right; an unanswered question is wrong.

    As in the release an answer is right when it is the letter and nothing else.
    """
    texts = {key: text.strip() for key, text in keyed(texts).items()}
    return {key: texts.get(key) == question["answer"] for key, question in by_id(questions).items()}


def evaluate(annotation: dict, texts: dict) -> dict[str, float]:
    """Returns accuracies in percent by printed name; an unanswered question is wrong."""
    questions = annotation["questions"]
    right = list(points(questions, texts).values())

    def share(chosen) -> float:
        hits = [ok for ok, question in zip(right, questions, strict=True) if chosen(question)]
        return sum(hits) / len(hits) * 100 if hits else 0.0

    types = sorted(annotation["question_type"].items(), key=lambda item: item[1])
    scores = {name: share(lambda q, i=i: q["question_type_id"] == i) for name, i in types}
    scores[TOTAL] = share(lambda q: True)
    for kind in ("image", "video"):
        scores[f"{kind} accuracy"] = share(lambda q, kind=kind: q["data_type"] == kind)
    return scores


def texts_by_id(answers: list[dict]) -> dict:
    """Returns the answers by question id; ValueError when two to one question differ."""
    return {key: answer["text"] for key, answer in unique(answers).items()}


def asked(annotation: dict, answers: list[dict]) -> list[dict]:
    """Returns the questions that were answered; ValueError on an answer to no question."""
    known = by_id(annotation["questions"])
    check_known(answers, known, "the annotation")
    given = texts_by_id(answers)
    return [question for key, question in known.items() if key in given]


def report(scores: dict[str, float]) -> str:
    return "".join(f"{name}: {score:.2f}%\n" for name, score in scores.items())


def evaluate_all(annotation: dict, answers: list[dict]) -> dict[str, float]:
    """`evaluate` over all questions of the annotation; says how many have no answer."""
    asked(annotation, answers)
    say_missing(answers, by_id(annotation["questions"]), "they count as wrong")
    return evaluate(annotation, texts_by_id(answers))


def main():
    run_scorer(__doc__, read_json, evaluate_all, report)


if __name__ == "__main__":
    main()
