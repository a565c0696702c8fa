"""What evaluation servers take: one function per format, used by `score` and scripts/convert_*."""

import json
import os
from collections.abc import Iterable

from llava.eval.m4c_evaluator import EvalAIAnswerProcessor
from llava.eval.tasks import as_int

MMBENCH_COLUMNS = ("index", "question", "A", "B", "C", "D", "answer", "split")
MMBENCH_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_COLUMN = 6


def gqa(answers: list[dict]) -> list[dict]:
    """Returns `[{"questionId", "prediction"}]`: trailing periods removed, lower case."""
    return [
        {"questionId": answer["question_id"], "prediction": answer["text"].rstrip(".").lower()}
        for answer in answers
    ]


def vqav2(questions: list[dict], texts: dict) -> list[dict]:
    """Returns `[{"question_id", "answer"}]` in question order.

    The server wants an answer to every question of the full test set; those that were not asked
    get an empty one.
    """
    normalise = EvalAIAnswerProcessor()
    ids = [question["question_id"] for question in questions]
    return [{"question_id": key, "answer": normalise(texts.get(key, ""))} for key in ids]


def vizwiz(questions: list[dict], texts: dict) -> list[dict]:
    """Returns `[{"image", "answer"}]` in question order; every question needs an answer."""
    if missing := [q["question_id"] for q in questions if q["question_id"] not in texts]:
        raise ValueError(f"{len(missing)} questions have no answer, e.g. {missing[0]}")
    normalise = EvalAIAnswerProcessor()
    return [{"image": q["image"], "answer": normalise(texts[q["question_id"]])} for q in questions]


def mmbench(rows: list[dict], answers: list[dict]) -> list[list]:
    """Returns the header and one list of cells per row; the last answer to a question counts."""
    predictions = {answer["question_id"]: answer["text"] for answer in answers}
    names = [name for name in rows[0] if name not in MMBENCH_DROPPED] if rows else MMBENCH_COLUMNS
    names = [*names[:PREDICTION_COLUMN], "prediction", *names[PREDICTION_COLUMN:]]
    table = [names]
    for row in rows:
        index = as_int(row["index"])
        cells = row | {"index": index, "prediction": predictions.get(index)}
        table.append([cells[name] for name in names])
    return table


def mmvet(answers: list[dict]) -> dict[str, str]:
    """Returns `{"v1_<question_id>": answer}`, what the MM-Vet judge reads."""
    return {f"v1_{answer['question_id']}": answer["text"] for answer in answers}


def seed(questions: list[dict], texts: dict) -> list[dict]:
    """Returns one `{"question_id", "prediction"}` per question; unanswered ones are empty."""
    return [
        {"question_id": key, "prediction": texts.get(as_int(key), "")}
        for key in (question["question_id"] for question in questions)
    ]


def write_json(content, path: str, indent: int | None = None) -> None:
    _make_folder(path)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=indent)


def write_jsonl(records: Iterable[dict], path: str) -> None:
    _make_folder(path)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def write_xlsx(table: list[list], path: str) -> None:
    """Writes one sheet. Raises ImportError without the package openpyxl (extra `eval`)."""
    try:
        import openpyxl
    except ImportError as error:
        raise ImportError('openpyxl is missing: pip install -e ".[eval]"') from error
    _make_folder(path)
    book = openpyxl.Workbook()
    book.active.title = "Sheet1"
    for row in table:
        book.active.append(row)
    book.save(path)


def _make_folder(path: str) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
