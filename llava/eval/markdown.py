"""Tables in Markdown, and the places of a page that programs write them into."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from llava.errors import errors_as_messages
from llava.program_parser import ProgramParser

RULES = {"l": "---", "r": "---:"}


def table(head: Sequence[str], rows: Iterable[Sequence], align: str = "l") -> str:
    """Returns a table without a line break at its end.

    align: `l` (left) or `r` (right) per column; the last letter holds for the columns behind it
    """
    rules = [RULES[letter] for letter in align.ljust(len(head), align[-1])]
    return "\n".join(map(_line, (head, rules, *rows)))


def _line(cells: Sequence) -> str:
    return "| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |"


def marks(name: str) -> tuple[str, str]:
    """The lines of a page between which a program writes; name: of the place."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def write_between_marks(path: str, text: str, name: str) -> None:
    """Replaces what stands between the two marks `name` of a page, or writes a page that is new.

    Raises ValueError where a page has no such place.
    """
    begin, end = marks(name)
    block = f"{begin}\n\n{text}\n{end}\n"
    try:
        with open(path, encoding="utf-8") as file:
            page = file.read()
    except FileNotFoundError:
        page = block
    page, places = re.subn(f"^{begin}\n.*?^{end}\n", lambda _: block, page, flags=re.S | re.M)
    if places != 1:
        raise ValueError(f"{path} must have one line {begin} and one line {end} around the table")
    with open(path, "w", encoding="utf-8") as file:
        file.write(page)


def publish(text: str, path: str | None, name: str) -> None:
    """Prints a table and, where a page is given, writes it between the marks `name` there."""
    print(text, end="")
    if path:
        write_between_marks(path, text, name)


@errors_as_messages()
def run_table_program(about: str, report: Callable[[], str], name: str) -> None:
    """A program whose only option is a page to write its table into.

    about:  docstring of the program; its first line is what `--help` says
    report: makes the table
    name:   of the marks around it
    """
    parser = ProgramParser(about)
    parser.add_argument("--markdown", metavar="FILE", help="write the table into this page, too")
    args = parser.parse_args()
    publish(report(), args.markdown, name)
