"""Tables in Markdown."""

from collections.abc import Iterable, Sequence

RULES = {"l": "---", "r": "---:"}


def table(head: Sequence[str], rows: Iterable[Sequence], align: str = "l") -> str:
    """Returns a table without a line break at its end.

    align: `l` (left) or `r` (right) per column; the last letter holds for the columns behind it
    """
    rules = [RULES[letter] for letter in align.ljust(len(head), align[-1])]
    return "\n".join(map(_line, (head, rules, *rows)))


def _line(cells: Sequence) -> str:
    return "| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |"
