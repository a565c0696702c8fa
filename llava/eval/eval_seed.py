"""SEED-Bench: accuracy per question type, and over images and videos.

python -m llava.eval.eval_seed --annotation-file SEED-Bench.json --result-file A.jsonl

`scripts/convert_seed_for_submission.py` prints the same and writes the leaderboard's file, too.
"""

from llava.eval.scorer_cli import run_scorer
from llava.eval.tasks import as_int, read_json

TOTAL = "Total accuracy"


def evaluate(annotation: dict, texts: dict) -> dict[str, float]:
    """Returns accuracies in percent by printed name; an unanswered question is wrong."""
    questions = annotation["questions"]
    right = [texts.get(as_int(q["question_id"])) == q["answer"] for q in questions]

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
    return {as_int(answer["question_id"]): answer["text"] for answer in answers}


def report(scores: dict[str, float]) -> str:
    return "".join(f"{name}: {score:.2f}%\n" for name, score in scores.items())


def main():
    run_scorer(
        __doc__, read_json, lambda truth, answers: evaluate(truth, texts_by_id(answers)), report
    )


if __name__ == "__main__":
    main()
