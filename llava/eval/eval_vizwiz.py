"""VizWiz: soft accuracy on a split whose answers are public (validation).

python -m llava.eval.eval_vizwiz --annotation-file val.json --question-file llava_val.jsonl \
    --result-file A.jsonl

The answers to the test split are known to its server only, and that is closed.
"""

import argparse

from llava.eval.answer_lines import read_answers
from llava.eval.errors import errors_as_messages
from llava.eval.m4c_evaluator import TextVQAAccuracyEvaluator
from llava.eval.tasks import read_json_list, read_jsonl


def read_annotations(path: str) -> dict[str, list[str]]:
    """Returns the ten human answers by image; VizWiz asks one question per image."""
    entries = read_json_list(path, ("image", "answers"))
    return {e["image"]: [answer["answer"] for answer in e["answers"]] for e in entries}


def evaluate(humans: dict[str, list[str]], questions: list[dict], answers: list[dict]) -> dict:
    """Returns `{"score": accuracy in percent, "count": n}` and that of unanswerable questions."""
    images = {question["question_id"]: question["image"] for question in questions}
    entries = []
    for answer in answers:
        image = images.get(answer["question_id"])
        if image not in humans:
            raise ValueError(f"question {answer['question_id']!r}: no annotation of {image!r}")
        entries.append({"pred_answer": answer["text"], "gt_answers": humans[image]})
    evaluator = TextVQAAccuracyEvaluator()
    said = [entry["pred_answer"].strip(" .").lower() == "unanswerable" for entry in entries]
    return {
        "score": 100 * evaluator.eval_pred_list(entries) if entries else 0.0,
        "count": len(entries),
        "said_unanswerable": 100 * sum(said) / max(len(said), 1),
    }


def report(result: dict) -> str:
    return (
        f"Samples: {result['count']}\nAccuracy: {result['score']:.2f}%\n"
        f"Answered 'unanswerable': {result['said_unanswerable']:.2f}%\n"
    )


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annotation-file", required=True, help="val.json")
    parser.add_argument("--question-file", required=True)
    parser.add_argument("--result-file", required=True)
    args = parser.parse_args()
    questions = read_jsonl(args.question_file, ("question_id", "image"))
    answers = read_answers(args.result_file)
    print(report(evaluate(read_annotations(args.annotation_file), questions, answers)), end="")


if __name__ == "__main__":
    main()
