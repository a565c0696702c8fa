"""What evaluation servers take: one function per format, used by `score` and scripts/convert_*."""

import json
import os
from collections.abc import Iterable

from llava.eval.files.matching import check_known, keyed, question_id, source, unique
from llava.eval.files.records import Records, as_int
from llava.eval.scoring.m4c import EvalAIAnswerProcessor

MMBENCH_COLUMNS = ("index", "question", "A", "B", "C", "D", "answer", "split")
MMBENCH_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_COLUMN = 6


def gqa(answers: list[dict]) -> list[dict]:
    """Returns `[{"questionId", "prediction"}]`: trailing periods removed, lower case."""
    lines = (
        {"questionId": answer["question_id"], "prediction": answer["text"].rstrip(".").lower()}
        for answer in unique(answers).values()
    )
    return Records(source(answers), lines)


def vqav2(questions: list[dict], texts: dict) -> list[dict]:
    """Returns `[{"question_id", "answer"}]` in question order.

    The server wants an answer to every question of the full test set; those that were not asked
    get an empty one. Raises ValueError when an answer belongs to none.
    """
    normalise, texts = EvalAIAnswerProcessor(), keyed(texts)
    _check_known(texts, questions)
    return [
        {"question_id": q["question_id"], "answer": normalise(texts.get(question_id(q), ""))}
        for q in questions
    ]


def _check_known(texts: dict, questions: list[dict]) -> None:
    if strays := texts.keys() - set(map(question_id, questions)):
        raise ValueError(
            f"{len(strays)} answers belong to no question of {source(questions)}, such as that to "
            f"question {min(strays, key=str)!r}"
        )


def vizwiz(questions: list[dict], texts: dict) -> list[dict]:
    """Returns `[{"image", "answer"}]` in question order; every question needs an answer."""
    normalise, texts = EvalAIAnswerProcessor(), keyed(texts)
    _check_known(texts, questions)
    if missing := [q["question_id"] for q in questions if question_id(q) not in texts]:
        raise ValueError(f"{len(missing)} questions have no answer, e.g. {missing[0]}")
    return [{"image": q["image"], "answer": normalise(texts[question_id(q)])} for q in questions]


def mmbench(rows: list[dict], answers: list[dict]) -> list[list]:
    """Returns the header and one list of cells per row.

    The last answer to a row counts, of those to its options in the order of the table: the server
    knows no other rotation of a row. Raises ValueError when an answer belongs to no row.
    """
    check_known(answers, {as_int(row["index"]) for row in rows}, source(rows))
    predictions = {question_id(a): a["text"] for a in answers if _in_table_order(a)}
    names = [name for name in rows[0] if name not in MMBENCH_DROPPED] if rows else MMBENCH_COLUMNS
    names = [*names[:PREDICTION_COLUMN], "prediction", *names[PREDICTION_COLUMN:]]
    table = [names]
    for row in rows:
        index = as_int(row["index"])
        cells = row | {"index": index, "prediction": predictions.get(index)}
        table.append([cells[name] for name in names])
    return table


def _in_table_order(answer: dict) -> bool:
    letters = list(answer.get("option_char", ""))
    return letters == sorted(letters)


def mmvet(answers: list[dict]) -> dict[str, str]:
    """Returns `{"v1_<question_id>": answer}`, what the MM-Vet judge reads."""
    given = unique(answers, lambda answer: mmvet_name(answer["question_id"]))
    return {name: answer["text"] for name, answer in given.items()}


def mmvet_name(key: int | str) -> str:
    """`v1_7` for question 7; the benchmark's own files have it with the `v1_`."""
    return f"v1_{str(key).strip().removeprefix('v1_')}"


def seed(questions: list[dict], texts: dict) -> list[dict]:
    """Returns one `{"question_id", "prediction"}` per question; unanswered ones are empty.

    Raises ValueError when an answer belongs to none.
    """
    texts = keyed(texts)
    _check_known(texts, questions)
    return [
        {"question_id": q["question_id"], "prediction": texts.get(question_id(q), "")}
        for q in questions
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
