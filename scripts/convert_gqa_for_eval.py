"""Turns an answers file into the prediction list of the official GQA scorer."""

import argparse
import json

from llava.eval.errors import errors_as_messages
from llava.eval.tasks import read_jsonl


def convert(answers: list[dict]) -> list[dict]:
    """Returns `[{"questionId", "prediction"}]`: trailing periods removed, lower case."""
    return [
        {"questionId": answer["question_id"], "prediction": answer["text"].rstrip(".").lower()}
        for answer in answers
    ]


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--src", required=True, help="answers file")
    parser.add_argument("--dst", required=True, help="prediction file to write")
    args = parser.parse_args()
    predictions = convert(read_jsonl(args.src, ("question_id", "text")))
    with open(args.dst, "w", encoding="utf-8") as file:
        json.dump(predictions, file)


if __name__ == "__main__":
    main()
