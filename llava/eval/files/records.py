"""Reading files of records: JSON lines, JSON lists and tables; whatever is broken is named.

A file of 100,000 questions with one bad line is found out at 3 a.m. otherwise.
"""

from __future__ import annotations

import csv
import json
import math
import re

TABLE_COLUMNS = ("index", "question", "A", "B", "image")
#: a missing cell, as pandas reads it, with which the published numbers were made; to LLaVA, "nan"
#: and "none" are one in any case
MISSING_CELLS = {"", "NA", "N/A", "n/a", "<NA>", "#N/A", "#N/A N/A", "#NA", "NULL", "null", "-nan"}
MISSING_CELLS |= {"-NaN", "1.#IND", "1.#QNAN", "-1.#IND", "-1.#QNAN"}


class Record(dict):
    """One record of a file.

    where: the file and the line, or the item, that it stands in
    """

    where = ""

    def __init__(self, values=(), where: str = ""):
        super().__init__(values)
        self.where = where


class Records(list):
    """Records of a file, which know for messages where they come from."""

    def __init__(self, path: str, records=()):
        super().__init__(records)
        self.path = path


def parse_json(text: bytes | str):
    """The JSON value of a text; a ValueError says in a few words why it has none.

    Numbers must be finite: JSON knows no others, and a score must not become one.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise NotJSON(f"not valid JSON ({error.msg} at column {error.colno})", error) from error
    except RecursionError as error:
        raise ValueError("not readable: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from error


class NotJSON(ValueError):
    """A syntax error, with the place where it is."""

    def __init__(self, message: str, error: json.JSONDecodeError):
        super().__init__(message)
        self.line, self.reason = error.lineno, error.msg


def _refuse(name: str):
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is larger than any number")
    return value


def kind_of(value) -> str:
    """What a JSON value is, in a word or two."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "no value")


def is_id(value) -> bool:
    """Whether a JSON value can identify a question."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def as_int(text: str | int | float) -> int | str:
    """Returns an integer where the text is one, else the text: identifiers come in both kinds."""
    if isinstance(text, float) and text.is_integer():
        return int(text)
    text = str(text).strip()
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else text


def read_jsonl(path: str, fields: tuple[str, ...] = ()) -> Records:
    """Returns the records of a JSON-lines file; `fields` must be present in each of them."""
    records = Records(path)
    with open(path, "rb") as file:  # bytes, so that a line in a wrong encoding is named as well
        for number, line in enumerate(file, start=1):
            if line.strip():
                records.append(_parse_line(line, f"{path}, line {number}", fields))
    return records


def _parse_line(line: bytes, where: str, fields: tuple[str, ...]) -> Record:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return _checked(record, where, fields)


def _checked(record, where: str, fields) -> Record:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, found {type(record).__name__}")
    if missing := [name for name in fields if name not in record]:
        raise ValueError(f"{where}: no field {', '.join(map(repr, missing))}")
    return Record(record, where)


def read_json_list(path: str, fields: tuple[str, ...] = ()) -> Records:
    """Returns the records of a JSON list; `fields` must be present in each of them."""
    records = read_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list, found {type(records).__name__}")
    places = enumerate(records, start=1)
    return Records(path, (_checked(r, f"{path}, item {i}", fields) for i, r in places))


def read_text(path: str) -> str:
    """Returns the content of a text file; ValueError names one that is none."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            return file.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not valid UTF-8 ({error.reason})") from error


def complete(records: list[dict], fields: tuple[str, ...]) -> Records:
    """The records that have all the fields: one without them is no question, and was not asked."""
    whole = (record for record in records if all(name in record for name in fields))
    return Records(getattr(records, "path", "the questions"), whole)


def read_json(path: str):
    """Returns the content of a JSON file; an error names file and, for syntax, the line."""
    with open(path, "rb") as file:
        content = file.read()
    try:
        return parse_json(content)
    except NotJSON as error:
        where = f"{path}, line {error.line}"
        raise ValueError(f"{where}: not valid JSON ({error.reason})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_table(path: str, columns: tuple[str, ...] = TABLE_COLUMNS) -> Records:
    """Returns the rows of a tab-separated table (cells are strings, missing ones None)."""
    csv.field_size_limit(2**31 - 1)  # a cell holds a whole picture
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t")
        try:
            header = next(reader, [])
            if missing := [name for name in columns if name not in header]:
                raise ValueError(f"{path}, line 1: no column {', '.join(missing)}")
            wheres = ((row, f"{path}, line {reader.line_num}") for row in reader if row)
            return Records(path, (_table_row(row, header, where) for row, where in wheres))
        except csv.Error as error:
            where = f"{path}, line {reader.line_num}"
            raise ValueError(f"{where}: not a row of a table ({error})") from error
        except UnicodeDecodeError as error:
            where = f"{path}, after line {reader.line_num}"
            raise ValueError(f"{where}: not valid UTF-8 ({error.reason})") from error


def _table_row(row: list[str], header: list[str], where: str) -> Record:
    if len(row) != len(header):
        raise ValueError(f"{where}: {len(row)} cells where the header has {len(header)}")
    missing = (cell in MISSING_CELLS or cell.lower() in ("nan", "none") for cell in row)
    cells = zip(header, row, missing, strict=True)
    return Record({name: None if gone else cell for name, cell, gone in cells}, where)
