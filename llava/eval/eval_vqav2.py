"""VQAv2: soft accuracy on a split whose answers are public (the test server keeps its own).

python -m llava.eval.eval_vqav2 --annotation-file v2_mscoco_val2014_annotations.json \
    --result-file A.jsonl
"""

from llava.eval.m4c_evaluator import TextVQAAccuracyEvaluator
from llava.eval.scorer_cli import run_scorer
from llava.eval.tasks import read_json


def read_annotations(path: str) -> dict[int, list[str]]:
    """Returns the ten human answers by question id."""
    entries = read_json(path)["annotations"]
    return {e["question_id"]: [a["answer"] for a in e["answers"]] for e in entries}


def evaluate(humans: dict[int, list[str]], answers: list[dict]) -> dict:
    """Returns `{"score": accuracy in percent, "count": n}` of answers to annotated questions."""
    if unknown := [a["question_id"] for a in answers if a["question_id"] not in humans]:
        raise ValueError(f"{len(unknown)} answers without annotation, e.g. {unknown[0]!r}")
    predictions = [
        {"pred_answer": a["text"], "gt_answers": humans[a["question_id"]]} for a in answers
    ]
    accuracy = TextVQAAccuracyEvaluator().eval_pred_list(predictions)
    return {"score": 100 * accuracy, "count": len(predictions)}


def report(result: dict) -> str:
    return f"Samples: {result['count']}\nAccuracy: {result['score']:.2f}%\n"


def main():
    run_scorer(__doc__, read_annotations, evaluate, report)


if __name__ == "__main__":
    main()
