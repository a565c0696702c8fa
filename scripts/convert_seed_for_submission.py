"""Scores SEED-Bench answers per question type and writes the upload file."""

import argparse
import json
import os

from llava.eval.errors import errors_as_messages
from llava.eval.tasks import as_int, read_json, read_jsonl


def evaluate(annotation: dict, texts: dict) -> dict[str, float]:
    """Returns accuracies in percent by printed name; an unanswered question is wrong."""
    questions = annotation["questions"]
    right = [texts.get(as_int(q["question_id"])) == q["answer"] for q in questions]

    def share(chosen) -> float:
        hits = [ok for ok, question in zip(right, questions, strict=True) if chosen(question)]
        return sum(hits) / len(hits) * 100 if hits else 0.0

    types = sorted(annotation["question_type"].items(), key=lambda item: item[1])
    scores = {name: share(lambda q, i=i: q["question_type_id"] == i) for name, i in types}
    scores["Total accuracy"] = share(lambda q: True)
    for kind in ("image", "video"):
        scores[f"{kind} accuracy"] = share(lambda q, kind=kind: q["data_type"] == kind)
    return scores


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotation-file", required=True, help="SEED-Bench.json")
    parser.add_argument("--result-file", required=True, help="answers file")
    parser.add_argument("--result-upload-file", required=True, help="file to write")
    args = parser.parse_args()
    annotation = read_json(args.annotation_file)
    answers = read_jsonl(args.result_file, ("question_id", "text"))
    texts = {as_int(answer["question_id"]): answer["text"] for answer in answers}
    for name, score in evaluate(annotation, texts).items():
        print(f"{name}: {score:.2f}%")
    os.makedirs(os.path.dirname(args.result_upload_file) or ".", exist_ok=True)
    with open(args.result_upload_file, "w", encoding="utf-8") as file:
        for question in annotation["questions"]:
            key = question["question_id"]
            line = {"question_id": key, "prediction": texts.get(as_int(key), "")}
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
