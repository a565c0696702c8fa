"""A comparison as text: Markdown for people, CSV for programs, a page for docs/."""

from __future__ import annotations

import csv
import io
import os

from llava.eval.compare.budget import Budget
from llava.eval.compare.cells import bold, in_brackets
from llava.eval.compare.comparison import AVERAGE, Cell, Comparison, Row
from llava.eval.compare.groups import by_cost
from llava.eval.compare.hard import HardCell
from llava.eval.compare.scores import DENSE
from llava.eval.markdown import table

#: a page keeps what stands from this line on when it is written again
BY_HAND = "<!-- written by hand -->"
COLUMNS = (
    "method tokens share task metric score percent low high change change_low change_high loyalty "
    "count failed hard hard_change hard_count visual_tokens tokens_in kv_bytes flops "
    "seconds_first_token answers_per_second"
).split()


def csv_text(comparison: Comparison) -> str:
    """One line per run and benchmark, and one for the average of each run."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in comparison.rows:
        for task, cell in row.cells.items():
            writer.writerow(_plain(value) for value in _values(row, task, cell))
    return out.getvalue()


def _values(row: Row, task: str, cell: Cell) -> list:
    none = (None, None)
    return [
        *(row.method, row.budget.tokens, row.budget.share),
        *(task, cell.metric, cell.score, cell.percent),
        *(cell.range or none),
        cell.change,
        *(cell.change_range or none),
        *(cell.loyalty, cell.count, cell.failed),
        *((hard.percent, hard.change, hard.count) if (hard := cell.hard) else (None,) * 3),
        *(row.visual_tokens, row.cost.tokens_in),
        *(row.cost.kv_bytes, row.cost.flops, row.cost.seconds, row.answers_per_second),
    ]


def _plain(value) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def markdown(comparison: Comparison) -> str:
    """Averages and costs of runs that cost about the same, then every benchmark, then the hard
    questions of every budget, then what was not run."""
    dense = comparison.dense
    cell = dense.cells[AVERAGE]
    settings = comparison.settings
    each = "visual tokens" if dense.budget.tokens else "visual tokens per question on average"
    lines = [
        f"Model `{settings['model_name']}`{_computed(settings)}, {cell.count} questions of "
        f"{len(comparison.tasks)} "
        f"benchmarks ({', '.join(comparison.tasks)}). Scores are percent of the maximum; the "
        "average weighs benchmarks alike. Brackets: 95 % intervals, bootstrap over images with all "
        "their questions; the change is paired with the unpruned answers to the same questions. "
        "Bold: the change is significant, its interval leaves out 0. Same: answers that are those "
        "of the unpruned model. Kept: visual tokens per decoder layer, on average over layers and "
        "questions; the tables group runs by it, since the budget that was asked for means "
        "something else to every method.",
        "",
        f"Unpruned: {cell.percent:.1f} {in_brackets(cell.range)}, {dense.visual_tokens:.0f} "
        f"{each}, KV cache {dense.cost.kv_bytes / 1e6:.2f} MB, "
        f"{dense.cost.flops / 1e9:.2f} GFLOP, first token after {1e3 * dense.cost.seconds:.0f} ms.",
    ]
    if any(row.cells[AVERAGE].failed for row in comparison.rows):
        lines += ["", *_failed_table(comparison)]
    groups = by_cost(comparison)
    for group in groups:
        lines += ["", f"**{_capital(group.title)}**", "", _average_table(group.rows, dense)]
    for group in groups:
        title = f"**By benchmark, {group.title}**"
        lines += ["", title, "", _task_table(group.rows, comparison)]
    for budget in _budgets(comparison):
        lines += _hard_table(_ranked(comparison, budget), comparison.tasks)
    if comparison.missing:
        lines += ["", "**Not run**", "", *comparison.missing]
    return "\n".join(lines) + "\n"


def _computed(settings: dict) -> str:
    """In which numbers and on what, where that was noted."""
    return f" in {settings['dtype']} ({settings['device']})" if "dtype" in settings else ""


def _budgets(comparison: Comparison) -> list[Budget]:
    found = {row.budget for row in comparison.rows if row.method != DENSE}
    return sorted(found, key=lambda budget: budget.order, reverse=True)


def _ranked(comparison: Comparison, budget: Budget) -> list[Row]:
    rows = [r for r in comparison.rows if r.budget == budget and r.method != DENSE]
    return sorted(rows, key=lambda row: -row.cells[AVERAGE].percent)


def _capital(title: str) -> str:
    return title[0].upper() + title[1:]


def _average_table(rows: list[Row], dense: Row) -> str:
    head = ["method", "asked for", "average", "change", "same, %", "kept", "KV, MB", "GFLOP"]
    head += ["/ unpruned", "first token, ms", "/ unpruned"]
    lines = [_average_cells(row, dense) for row in rows]
    rates = [row.answers_per_second for row in rows]
    if any(rates):
        head.append("answers/s")
        for line, rate in zip(lines, rates, strict=True):
            line.append("" if rate is None else f"{rate:.1f}")
    return table(head, lines, "lr")


def _average_cells(row: Row, dense: Row) -> list[str]:
    cell, cost = row.cells[AVERAGE], row.cost
    return [
        _name(row),
        row.budget.label,
        f"{cell.percent:.1f} {in_brackets(cell.range)}",
        _change(cell),
        f"{cell.loyalty:.1f}",
        f"{row.visual_tokens:.1f}",
        f"{cost.kv_bytes / 1e6:.2f}",
        f"{cost.flops / 1e9:.2f}",
        f"{cost.flops / dense.cost.flops:.2f}",
        f"{1e3 * cost.seconds:.0f}",
        f"{cost.seconds / dense.cost.seconds:.2f}",
    ]


def _task_table(rows: list[Row], comparison: Comparison) -> str:
    tasks = comparison.tasks
    lines = [
        [_name(row), row.budget.label, *(_task_cell(row.cells[task]) for task in tasks)]
        for row in [comparison.dense, *rows]
    ]
    return table(["method", "asked for", *tasks], lines, "lr")


def _hard_table(rows: list[Row], tasks: list[str]) -> list[str]:
    """Scores on the questions that smaller images get wrong, best average first; nothing where no
    run at this budget was on smaller images."""
    rows = [row for row in rows if row.cells[AVERAGE].hard]
    if not rows:
        return []
    rows.sort(key=lambda row: -row.cells[AVERAGE].hard.percent)
    own = [[row.cells[task].hard for row in rows] for task in tasks]
    counts = [max((hard.count for hard in column if hard), default=0) for column in own]
    names = [AVERAGE, *(task for task, count in zip(tasks, counts, strict=True) if count)]
    head = [AVERAGE, *(f"{t} ({n})" for t, n in zip(tasks, counts, strict=True) if n)]
    full = [next(row.cells[name].hard for row in rows if row.cells[name].hard) for name in names]
    lines = [["unpruned", *(f"{hard.percent - hard.change:.1f}" for hard in full)]]
    lines += [[_name(row), *(_hard_cell(row.cells[name].hard) for name in names)] for row in rows]
    title = (
        f"**Hard questions at {rows[0].budget.title}**: those that smaller images of that many "
        "tokens get wrong (how many, in brackets)"
    )
    return ["", title, "", table(["method", *head], lines, "lr")]


def _hard_cell(hard: HardCell | None) -> str:
    return "" if hard is None else bold(f"{hard.percent:.1f}", hard.change_range)


def _failed_table(comparison: Comparison) -> list[str]:
    """Which scores are not of all questions."""
    cells = [(row, task, row.cells[task]) for row in comparison.rows for task in comparison.tasks]
    lines = [
        (_name(row), row.budget.label, task, cell.failed, cell.count)
        for row, task, cell in cells
        if cell.failed
    ]
    head = ["method", "tokens", "benchmark", "failed", "counted"]
    title = "**Questions that failed** (no score counts them)"
    return [title, "", table(head, lines, "lrlr")]


def _name(row: Row) -> str:
    return "unpruned" if row.method == DENSE else f"`{row.method}`"


def _task_cell(cell: Cell) -> str:
    text = bold(f"{cell.percent:.1f}", cell.change_range)
    return f"{text} ({cell.failed} failed)" if cell.failed else text


def _change(cell: Cell) -> str:
    text = f"{cell.change:+.1f} {in_brackets(cell.change_range, '+')}".strip()
    return bold(text, cell.change_range)


def by_hand(path: str) -> str:
    """What the page in a file has from the line `BY_HAND` on; "" without that line, or a file."""
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as file:
        _, mark, rest = file.read().partition(f"{BY_HAND}\n")
    return f"\n{mark}{rest}" if mark else ""


def page(text: str, pictures: dict[str, str], command: str, model: str) -> str:
    """A page such as docs/Results.md; pictures: axis -> file in images/."""
    titles = {"tokens": "visual tokens", "flops": "operations", "time": "measured time"}
    shown = "\n\n".join(
        f"![Score over {titles[axis]}](../images/{name})" for axis, name in pictures.items()
    )
    return (
        f"# Results on the playground: {model}\n\n"
        "What every method does to the model of the playground: scores, costs and agreement at "
        "equal budgets. Written by\n\n"
        f"```bash\n{command}\n```\n\n"
        "(a second call continues with the answers of the first). The playground's model is "
        "small: `playground/README.md` says what it can and cannot do. This is what methods do to "
        "*it*; the literature's numbers on full-size models are in "
        "`docs/published_numbers.csv`.\n\n"
        f"{shown}\n\n{text}"
    )
