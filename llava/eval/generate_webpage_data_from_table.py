"""Gathers questions, answers and reviews for a page that shows models side by side.

python -m llava.eval.generate_webpage_data_from_table [--table table] [--output webpage/data.json]

The folder holds `question.jsonl`, `answer/answer_MODEL.jsonl` of every model, and where there are
some, `review/review_MODEL.jsonl` or `review_MODEL_REFERENCE.jsonl` (what `eval_gpt_review` writes)
and `model.jsonl`. The output is laid out as the page of LLaVA's and Vicuna's releases reads it.
"""

import json
import os
import re

from llava.errors import errors_as_messages
from llava.eval.files.matching import by_id
from llava.eval.files.records import read_jsonl
from llava.program_parser import ProgramParser


def build(table: str) -> dict:
    """Returns `{"questions": [...], "models": {...}}`.

    Raises ValueError when a question lacks its answer or review, or a model has two reviews.
    """
    asked = by_id(read_jsonl(os.path.join(table, "question.jsonl"), ("question_id", "text")))
    answers = files(os.path.join(table, "answer"), "answer")
    if not answers:
        raise ValueError(f"{table}: no answer/answer_MODEL.jsonl")
    reviews = {}
    for name, path in files(os.path.join(table, "review"), "review").items():
        models = [model for model in answers if name == model or name.startswith(f"{model}_")]
        if not models:
            raise ValueError(f"{path}: the review of no model, choose from {', '.join(answers)}")
        model = max(models, key=len)
        if model in reviews:
            raise ValueError(f"{model} has two reviews, {reviews[model]} and {path}")
        reviews[model] = path
    answers = {model: by_question(path, asked, ("text",)) for model, path in answers.items()}
    reviews = {
        model: {key: words_and_scores(r) for key, r in by_question(path, asked).items()}
        for model, path in reviews.items()
    }
    questions = [
        {
            "id": question["question_id"],
            "category": question.get("category", ""),
            "question": question["text"],
            "answers": {model: given[key]["text"] for model, given in answers.items()},
            "evaluations": {model: given[key][0] for model, given in reviews.items()},
            "scores": {model: given[key][1] for model, given in reviews.items()},
        }
        for key, question in asked.items()
    ]
    return {"questions": questions, "models": models_of(os.path.join(table, "model.jsonl"))}


def files(folder: str, kind: str) -> dict[str, str]:
    """Returns the paths of `KIND_NAME.jsonl` in a folder by name; none where it does not exist."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    found = (re.fullmatch(rf"{kind}_(.+)\.jsonl", name) for name in names)
    return {match[1]: os.path.join(folder, match[0]) for match in found if match}


def by_question(path: str, asked: dict, fields: tuple[str, ...] = ()) -> dict:
    """The records of a file by question; ValueError when there is none to one of them."""
    records = by_id(read_jsonl(path, ("question_id", *fields)))
    if missing := [key for key in asked if key not in records]:
        raise ValueError(f"{path}: nothing on question {missing[0]!r}")
    return records


def words_and_scores(review: dict) -> tuple[str, list[float]]:
    """What the judge wrote and the scores in it, as `eval_gpt_review` or Vicuna's tables call them.

    Raises ValueError when a record has neither.
    """
    for names in (("content", "tuple"), ("text", "score")):
        if all(name in review for name in names):
            return review[names[0]], review[names[1]]
    raise ValueError(f"{review.where}: no review, which has `content` and `tuple`")


def models_of(path: str) -> dict:
    """What `model.jsonl` says of the models, by `model_id`."""
    records = read_jsonl(path, ("model_id",)) if os.path.exists(path) else []
    return {record["model_id"]: record for record in records}


@errors_as_messages()
def main():
    parser = ProgramParser(__doc__)
    parser.add_argument("--table", default="table", help="folder of the tables")
    parser.add_argument(
        "--output", default=os.path.join("webpage", "data.json"), help="file to write"
    )
    args = parser.parse_args()
    content = build(args.table)
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    with open(args.output, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
    print(f"{args.output}: {len(content['questions'])} questions")


if __name__ == "__main__":
    main()
