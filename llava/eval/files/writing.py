"""Writing files for other programs: JSON, JSON lines and spreadsheets."""

import json
import os
from collections.abc import Iterable

from llava.errors import how_to_install


def write_json(content, path: str, indent: int | None = None) -> None:
    _make_folder(path)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=indent)


def write_jsonl(records: Iterable[dict], path: str) -> None:
    _make_folder(path)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def write_xlsx(table: list[list], path: str) -> None:
    """Writes one sheet; texts stay texts, also those that begin like a formula, without the control
    characters that no sheet can hold. Raises ImportError without the package openpyxl (extra
    `eval`)."""
    try:
        import openpyxl
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError as error:
        raise ImportError(f"openpyxl is missing: {how_to_install('eval')}") from error
    _make_folder(path)
    book = openpyxl.Workbook()
    book.active.title = "Sheet1"
    for number, row in enumerate(table, start=1):
        for place, value in enumerate(row, start=1):
            cell = book.active.cell(number, place)
            if isinstance(value, str):
                cell.value, cell.data_type = ILLEGAL_CHARACTERS_RE.sub("", value), "s"
            else:
                cell.value = value
    book.save(path)


def _make_folder(path: str) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
