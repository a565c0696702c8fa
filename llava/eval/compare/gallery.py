"""All published comparisons on one page: every method on every family at every budget.

python -m llava.eval.compare.gallery [--results docs/results] [--page docs/Results_gallery.md]
    [--pages]

`llava.eval.compare --page` leaves its numbers in `results/` beside the page; this program puts what
lies there side by side. With --pages it also writes the pages of single models and their pictures
again, from the same numbers. It measures nothing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from llava.errors import errors_as_messages
from llava.eval.compare import pages
from llava.eval.compare.cells import bold, in_brackets
from llava.eval.compare.comparison import AVERAGE, Comparison, Row
from llava.eval.compare.scores import DENSE
from llava.eval.markdown import table
from llava.program_parser import ProgramParser

RESULTS, PAGE = Path("docs/results"), Path("docs/Results_gallery.md")
#: decimals that are kept of percentages, tokens and seconds
DECIMALS = 4
ABSENT = "–"
COLUMNS = ("kept", "change", "hard questions", "same, %")
HEAD = ("model", "not run", "share or tokens", "why")


def save(comparison: Comparison, folder: Path) -> Path:
    """Writes the numbers of a comparison into the folder of results, named after the model."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{comparison.settings['model_name']}.json"
    lines = (json.dumps(row) for row in _rounded(comparison.as_dict()["rows"]))
    about = {"settings": comparison.settings, "missing": comparison.missing}
    head = json.dumps(about, indent=1)[:-2]
    rows = ",\n".join(lines)
    path.write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    return path


def _rounded(values):
    if isinstance(values, float):
        return round(values, DECIMALS)
    if isinstance(values, dict):
        return {name: _rounded(value) for name, value in values.items()}
    return [_rounded(value) for value in values] if isinstance(values, list | tuple) else values


def read(folder: Path) -> list[Comparison]:
    """The comparisons of a folder, by the names of their models. Raises ValueError where there are
    none, or a file holds something else."""
    found = [load(path) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise ValueError(
            f"{folder} holds no results (*.json); llava.eval.compare --page writes them"
        )
    return found


def load(path: Path) -> Comparison:
    """The comparison that `save` wrote. Raises ValueError where a file holds something else."""
    try:
        return Comparison.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def share(row: Row, comparison: Comparison) -> float:
    """The budget that was asked for, as a share of the unpruned model's tokens, in percent."""
    whole = comparison.dense.visual_tokens
    return round(100 * min(row.budget.of(whole) / whole, 1), 1)


def gallery(comparisons: list[Comparison]) -> str:
    """The page."""
    lines = [
        "# All results side by side",
        "",
        "Written by `python -m llava.eval.compare.gallery` from `docs/results/*.json`, the numbers "
        "behind the pages of single models, which say how they were measured. There is a table for "
        "every share of the visual tokens that methods were asked to keep; in it a row is a method "
        "and a group of columns a model of the playground. **Kept**: the visual tokens that are "
        "left, on average over the decoder layers, in percent of the unpruned model's; where this "
        "is above the share, the method costs more than its label says. **Change**: the score "
        "minus that of the unpruned model, averaged over the benchmarks, with its 95 % interval; "
        "bold where the interval does not contain 0. **Hard questions**: the change on the "
        "questions that the unpruned model gets wrong when it is shown smaller images of the same "
        "cost. **Same** (loyalty): the share of answers that are letter for letter those of the "
        "unpruned model. Rows are sorted by the mean of the changes.",
    ]
    for own in comparisons:
        dense = own.dense.cells[AVERAGE]
        lines += [
            "",
            f"- `{own.settings['model_name']}`: {dense.count} questions, unpruned "
            f"{dense.percent:.1f} {in_brackets(dense.range)}",
        ]
    for part in sorted({share(row, own) for own in comparisons for row in _pruned(own)})[::-1]:
        lines += ["", f"## {part:g} % of the tokens", "", _table(comparisons, part)]
    lines += ["", *_absent(comparisons)]
    return "\n".join(lines) + "\n"


def _absent(comparisons: list[Comparison]) -> list[str]:
    """Why cells are empty: what smaller images have no hard questions for, what was refused, and
    what was not asked for."""
    missing = [[_reason(line) for line in own.missing] for own in comparisons]
    asked = [
        _methods(own) | {name for name, _, _ in lines}
        for own, lines in zip(comparisons, missing, strict=True)
    ]
    rows = []
    for own, lines, names in zip(comparisons, missing, asked, strict=True):
        rows += [(own.settings["model_name"], *line) for line in lines]
        never = sorted(set().union(*asked) - names)
        if never:
            rows.append((own.settings["model_name"], ", ".join(never), "all", "not asked for"))
    text = (
        f"Under *hard questions*, {ABSENT} stands for the methods that show the model smaller "
        "images: what they get wrong is what makes a question hard. In all columns of a model it "
        "says that there is no such run"
    )
    found = [f"{text}:", "", table(HEAD, rows, "l")] if rows else [f"{text}."]
    return [f"## What {ABSENT} means", "", *found]


def _reason(line: str) -> tuple[str, str, str]:
    """Method, budgets and reason of a line that `suite_report.not_run` wrote."""
    found = re.fullmatch(r"- (`[^`]+`) was not run at (.+?): (.*)", line)
    return (found[1], found[2], found[3]) if found else ("", "", line.removeprefix("- "))


def _methods(comparison: Comparison) -> set[str]:
    return {f"`{row.method}`" for row in _pruned(comparison)}


def _pruned(comparison: Comparison) -> Iterable[Row]:
    return (row for row in comparison.rows if row.method != DENSE)


def _table(comparisons: list[Comparison], part: float) -> str:
    by_model = [
        {row.method: row for row in _pruned(own) if share(row, own) == part} for own in comparisons
    ]
    present = [(own, rows) for own, rows in zip(comparisons, by_model, strict=True) if rows]
    methods = dict.fromkeys(name for _, rows in present for name in rows)
    head = ["method"]
    for own, _ in present:
        head += [f"{own.settings['model_name']}: {COLUMNS[0]}, %", *COLUMNS[1:]]
    lines = [
        [f"`{name}`", *(cell for own, rows in present for cell in _cells(rows.get(name), own))]
        for name in sorted(methods, key=lambda name: -_mean_change(name, present))
    ]
    return table(head, lines, "lr")


def _mean_change(method: str, present: list[tuple[Comparison, dict[str, Row]]]) -> float:
    changes = [rows[method].cells[AVERAGE].change for _, rows in present if method in rows]
    return sum(changes) / len(changes)


def _cells(row: Row | None, comparison: Comparison) -> list[str]:
    if row is None:
        return [ABSENT] * len(COLUMNS)
    cell, hard = row.cells[AVERAGE], row.cells[AVERAGE].hard
    change = f"{cell.change:+.1f} {in_brackets(cell.change_range, '+')}".strip()
    return [
        f"{100 * row.visual_tokens / comparison.dense.visual_tokens:.1f}",
        bold(change, cell.change_range),
        ABSENT if hard is None else bold(f"{hard.change:+.1f}", hard.change_range),
        f"{cell.loyalty:.1f}",
    ]


def write_page(comparison: Comparison, docs: Path) -> None:
    """Writes the page of a model again; numbers of older versions do not say which one it is."""
    if "page" in comparison.settings:
        print(f"written: {pages.write(comparison, docs)}, and its pictures")
    else:
        name = comparison.settings["model_name"]
        print(f"{name}: its numbers do not name a page; llava.eval.compare --page does that")


@errors_as_messages()
def main(argv: list[str] | None = None) -> None:
    parser = ProgramParser(__doc__, whole=True)
    parser.add_argument(
        "--results", metavar="DIR", default=str(RESULTS), help="folder of the numbers, *.json"
    )
    parser.add_argument("--page", metavar="FILE", default=str(PAGE), help="page to write")
    parser.add_argument(
        "--pages",
        action="store_true",
        help="also write the pages of single models and their pictures again, beside the page",
    )
    args = parser.parse_args(argv)
    comparisons = read(Path(args.results))
    if args.pages:
        for own in comparisons:
            write_page(own, Path(args.page).parent)
    text = gallery(comparisons)
    os.makedirs(os.path.dirname(args.page) or ".", exist_ok=True)
    Path(args.page).write_text(text, encoding="utf-8")
    print(f"written: {args.page}")


if __name__ == "__main__":
    main()
