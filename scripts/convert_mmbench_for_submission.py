"""Turns MMBench answers into the spreadsheet that the evaluation server takes."""

import argparse
import os

from llava.eval.errors import errors_as_messages
from llava.eval.tasks import as_int, read_jsonl, read_table

COLUMNS = ("index", "question", "A", "B", "C", "D", "answer", "split")
DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_COLUMN = 6


def convert(rows: list[dict], answers: list[dict]) -> list[list]:
    """Returns the header and one list of cells per row; the last answer to a question counts."""
    predictions = {answer["question_id"]: answer["text"] for answer in answers}
    names = [name for name in rows[0] if name not in DROPPED] if rows else list(COLUMNS)
    names.insert(PREDICTION_COLUMN, "prediction")
    table = [names]
    for row in rows:
        index = as_int(row["index"])
        cells = row | {"index": index, "prediction": predictions.get(index)}
        table.append([cells[name] for name in names])
    return table


def write_xlsx(table: list[list], path: str) -> None:
    """Writes one sheet; needs the package openpyxl (extra `eval`)."""
    try:
        import openpyxl
    except ImportError as error:
        raise ImportError('openpyxl is missing: pip install -e ".[eval]"') from error
    book = openpyxl.Workbook()
    book.active.title = "Sheet1"
    for row in table:
        book.active.append(row)
    book.save(path)


@errors_as_messages()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--annotation-file", required=True, help="the benchmark's table (.tsv)")
    parser.add_argument("--result-dir", required=True, help="folder of the answers file")
    parser.add_argument("--upload-dir", required=True, help="folder of the spreadsheet")
    parser.add_argument("--experiment", required=True, help="name of both files, without ending")
    args = parser.parse_args()
    answers = read_jsonl(
        os.path.join(args.result_dir, f"{args.experiment}.jsonl"), ("question_id", "text")
    )
    table = convert(read_table(args.annotation_file, ("index",)), answers)
    os.makedirs(args.upload_dir, exist_ok=True)
    write_xlsx(table, os.path.join(args.upload_dir, f"{args.experiment}.xlsx"))


if __name__ == "__main__":
    main()
