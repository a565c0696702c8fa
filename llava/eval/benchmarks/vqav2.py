"""VQAv2: soft accuracy on a split whose answers are public (the test server keeps its own).

python -m llava.eval.benchmarks.vqav2 --annotation-file v2_mscoco_val2014_annotations.json \
    --result-file A.jsonl
"""

from llava.eval.files.matching import check_known, keyed, unique
from llava.eval.files.records import read_json
from llava.eval.scoring.cli import run_scorer
from llava.eval.scoring.m4c import TextVQAAccuracyEvaluator


def read_annotations(path: str) -> dict[int, list[str]]:
    """Returns the ten human answers by question id."""
    entries = read_json(path)["annotations"]
    return keyed({e["question_id"]: [a["answer"] for a in e["answers"]] for e in entries})


def points(humans: dict[int, list[str]], answers: list[dict]) -> dict[int | str, float]:
    """Returns the soft accuracy (0 to 1) of every answer by question id.

    Raises ValueError when a question is not annotated, or has two different answers.
    """
    humans, score = keyed(humans), TextVQAAccuracyEvaluator().score
    check_known(answers, humans, "the annotations")
    return {key: score(a["text"], humans[key]) for key, a in unique(answers).items()}


def evaluate(humans: dict[int, list[str]], answers: list[dict]) -> dict:
    """Returns `{"score": accuracy in percent, "count": n}` of answers to annotated questions."""
    found = points(humans, answers)
    return {"score": 100 * sum(found.values()) / max(len(found), 1), "count": len(found)}


def report(result: dict) -> str:
    return f"Samples: {result['count']}\nAccuracy: {result['score']:.2f}%\n"


def main():
    run_scorer(__doc__, read_annotations, evaluate, report, list)


if __name__ == "__main__":
    main()
