"""Turns VizWiz answers into the upload of the evaluation server."""

import argparse
import json
import os

from llava.eval.answers import read_answers_tolerantly
from llava.eval.errors import errors_as_messages
from llava.eval.m4c_evaluator import EvalAIAnswerProcessor
from llava.eval.tasks import read_jsonl


def convert(questions: list[dict], texts: dict) -> list[dict]:
    """Returns `[{"image", "answer"}]` in question order; every question needs an answer."""
    if missing := [q["question_id"] for q in questions if q["question_id"] not in texts]:
        raise ValueError(f"{len(missing)} questions have no answer, e.g. {missing[0]}")
    normalise = EvalAIAnswerProcessor()
    return [{"image": q["image"], "answer": normalise(texts[q["question_id"]])} for q in questions]


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotation-file", required=True, help="question file")
    parser.add_argument("--result-file", required=True, help="answers file")
    parser.add_argument("--result-upload-file", required=True, help="file to write")
    args = parser.parse_args()
    texts, num_broken = read_answers_tolerantly(args.result_file)
    questions = read_jsonl(args.annotation_file, ("question_id", "image"))
    print(f"total results: {len(texts)}, total split: {len(questions)}, error_line: {num_broken}")
    upload = convert(questions, texts)
    os.makedirs(os.path.dirname(args.result_upload_file) or ".", exist_ok=True)
    with open(args.result_upload_file, "w", encoding="utf-8") as file:
        json.dump(upload, file)


if __name__ == "__main__":
    main()
