"""SEED-Bench: accuracy per question type, and over images and videos.

python -m llava.eval.eval_seed --annotation-file SEED-Bench.json --result-file A.jsonl

`scripts/convert_seed_for_submission.py` prints the same and writes the leaderboard's file, too.
"""

import argparse

from llava.eval.errors import errors_as_messages
from llava.eval.tasks import as_int, read_json, read_jsonl

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


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annotation-file", required=True, help="SEED-Bench.json")
    parser.add_argument("--result-file", required=True, help="answers file")
    args = parser.parse_args()
    texts = texts_by_id(read_jsonl(args.result_file, ("question_id", "text")))
    print(report(evaluate(read_json(args.annotation_file), texts)), end="")


if __name__ == "__main__":
    main()
