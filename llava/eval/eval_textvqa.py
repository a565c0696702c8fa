"""TextVQA: soft accuracy of answers about text in images.

python -m llava.eval.eval_textvqa --annotation-file TextVQA_0.5.1_val.json --result-file A.jsonl
"""

import argparse
import os
import re

from llava.eval.answer_lines import read_answers
from llava.eval.errors import errors_as_messages
from llava.eval.m4c_evaluator import TextVQAAccuracyEvaluator
from llava.eval.tasks import read_json

OCR_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def question_of(prompt: str) -> str:
    """Returns the question, in lower case, out of a recorded prompt with or without OCR tokens."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        question = OCR_PROMPT.search(prompt)[1]
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        question = lines[1] if lines[0].startswith("Reference OCR token:") else lines[0]
    elif len(lines) == 2:
        question = lines[0]
    else:
        raise ValueError(f"cannot find the question in the recorded prompt {prompt!r}")
    return question.lower()


def evaluate(annotations: list[dict], answers: list[dict]) -> dict:
    """Returns `{"score": accuracy in percent, "count": n}` of answers to annotated questions."""
    humans = {(a["image_id"], a["question"].lower()): a["answers"] for a in annotations}
    predictions = []
    for answer in answers:
        key = (answer["question_id"], question_of(answer["prompt"]))
        if key not in humans:
            raise ValueError(f"no annotation for image {key[0]!r} and question {key[1]!r}")
        predictions.append({"pred_answer": answer["text"], "gt_answers": humans[key]})
    accuracy = TextVQAAccuracyEvaluator().eval_pred_list(predictions)
    return {"score": 100.0 * accuracy, "count": len(predictions)}


def report(result: dict) -> str:
    return f"Samples: {result['count']}\nAccuracy: {result['score']:.2f}%\n\n"


def read_annotations(path: str) -> list[dict]:
    return read_json(path)["data"]


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--annotation-file", required=True)
    parser.add_argument("--result-file")
    parser.add_argument("--result-dir", help="score every .jsonl file of a folder")
    args = parser.parse_args()
    files = [args.result_file] if args.result_file else []
    if args.result_dir:
        files += [
            os.path.join(args.result_dir, name) for name in sorted(os.listdir(args.result_dir))
        ]
    annotations = read_annotations(args.annotation_file)
    for path in files:
        if not path.endswith(".jsonl"):
            print(f"Skipping {os.path.basename(path)}")
            continue
        print(os.path.splitext(os.path.basename(path))[0])
        answers = read_answers(path, ("question_id", "prompt", "text"))
        print(report(evaluate(annotations, answers)), end="")


if __name__ == "__main__":
    main()
