"""Score against what it costs: one line per method, one picture per kind of cost.

The methods that matter most are drawn in colour with their names beside them, the others in grey;
they and their colours are the same in all pictures of a comparison. A filled point differs
significantly from the unpruned score, an open one does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from llava.eval.compare.comparison import AVERAGE, Comparison, Row
from llava.eval.compare.labels import Line, name_lines
from llava.eval.compare.scores import DENSE
from llava.eval.compare.suite import makes_images_smaller
from llava.eval.compare.suite_report import mark_points
from llava.eval.plotting import import_pyplot
from llava.eval.scoring.bootstrap import is_significant

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by everybody
MARKERS = "osD^v"
GREY = "0.72"
NOTE = "filled: significantly other than unpruned; open: not"
LABELS = {
    "tokens": "visual tokens per decoder layer (average)",
    "flops": "operations of the prefill, of the unpruned model's",
    "time": "time to the first token, of the unpruned model's",
}
DPI = 150
#: letters of a line of the names below the plot
NAMES_WIDTH = 150


def place(row: Row, dense: Row, axis: str) -> float:
    """Where a run stands on the axis."""
    if axis == "tokens":
        return row.visual_tokens
    if axis == "flops":
        return row.cost.flops / dense.cost.flops
    return row.cost.seconds / dense.cost.seconds


def leaders(comparison: Comparison) -> list[str]:
    """The methods to be drawn in colour, as many as there are colours: those of which most runs
    are better than all that have fewer tokens per decoder layer, then those that are best on
    average. What makes images smaller is the reference, and never one of them."""
    rows = [row for row in comparison.rows if row.method != DENSE and not _is_reference(row.method)]
    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row.method, []).append(row.cells[AVERAGE].percent)
    wins, best = dict.fromkeys(scores, 0), float("-inf")
    for row in sorted(rows, key=lambda row: (row.visual_tokens, -row.cells[AVERAGE].percent)):
        if row.cells[AVERAGE].percent > best:
            best = row.cells[AVERAGE].percent
            wins[row.method] += 1
    return sorted(wins, key=lambda name: (-wins[name], -mean(scores[name])))[: len(COLORS)]


def _is_reference(method: str) -> bool:
    """Whether images are made smaller, which pruning has to beat."""
    return any(part in makes_images_smaller() for part in method.split("+"))


def plot(
    comparison: Comparison, axis: str, path: str, highlight: Sequence[str] | None = None
) -> None:
    """Draws the averages over `axis` ("tokens", "flops" or "time"): all methods left, and every
    benchmark small. The bar is the interval of the unpruned score.

    highlight: the methods in colour, five at most; None: `leaders`
    """
    pyplot = import_pyplot()
    tasks = comparison.tasks
    shown = leaders(comparison) if highlight is None else list(highlight)[: len(COLORS)]
    columns = max(1, -(-len(tasks) // 3))
    figure = pyplot.figure(figsize=(8 + 2.6 * columns, 8), layout="constrained", dpi=DPI)
    grid = figure.add_gridspec(3, columns + 3)
    large = figure.add_subplot(grid[:, :3])
    named = _panel(large, comparison, AVERAGE, axis, shown, large=True)
    large.set(xlabel=LABELS[axis], ylabel="score (% of maximum)")
    below = _zoom(large, comparison)
    for number, task in enumerate(tasks):
        axes = figure.add_subplot(grid[number % 3, 3 + number // 3])
        _panel(axes, comparison, task, axis, shown)
        axes.tick_params(labelsize=9)
    others = [name for name in _methods(comparison) if name not in shown]
    text = f"{NOTE}; dashed: unpruned" + (f"; grey: {', '.join(others)}" if others else "")
    text += f"; below the large panel: {below}" if below else ""
    figure.supxlabel(_wrapped(text), fontsize=8, color="0.35")
    name_lines(large, named)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def _zoom(axes, comparison: Comparison) -> str:
    """Lets the axes begin below the lowest run that is no reference; returns the references that
    are lower still, with their scores."""
    runs = [(row.method, row.cells[AVERAGE].percent) for row in comparison.rows]
    low, high = axes.get_ylim()
    least = min(score for name, score in runs if not _is_reference(name))
    start = max(low, least - 0.06 * (high - least))
    axes.set_ylim(start, high)
    lost: dict[str, list[str]] = {}
    for name, score in runs:
        if score < start:
            lost.setdefault(name, []).append(f"{score:.1f}")
    return ", ".join(f"{name} ({' and '.join(scores)})" for name, scores in lost.items())


def _wrapped(text: str) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > NAMES_WIDTH:
            lines.append("")
        lines[-1] += f"{word} "
    return "\n".join(line.rstrip() for line in lines)


def _methods(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(row.method for row in comparison.rows if row.method != DENSE))


def _panel(
    axes, comparison: Comparison, task: str, axis: str, shown: Sequence[str], large: bool = False
) -> list[Line]:
    """One set of lines; returns those in colour."""
    dense = comparison.dense
    full = dense.cells[task]
    axes.axhline(full.percent, color="0.4", linestyle="--", linewidth=1)
    if full.range is not None:
        axes.axhspan(*full.range, color="0.5", alpha=0.12, linewidth=0)
    size, width = (6, 1.8) if large else (4, 1.3)
    named = []
    for method in sorted(_methods(comparison), key=lambda name: name in shown):
        rows = [row for row in comparison.rows if row.method == method]
        cells = [(place(row, dense, axis), row.cells[task]) for row in rows]
        points = sorted((x, c.percent, is_significant(c.change_range)) for x, c in cells)
        xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
        if method not in shown:
            axes.plot(xs, ys, color=GREY, marker=".", ms=size / 2, linewidth=width / 2, zorder=1.5)
            continue
        number = shown.index(method)
        color, marker = COLORS[number], MARKERS[number]
        axes.plot(xs, ys, color=color, linewidth=width, label=method)
        mark_points(axes, points, color, marker, size)
        named.append(Line(method, color, list(zip(xs, ys, strict=True))))
    if axis == "tokens":
        axes.set_xscale("log", base=2)
        ticks = {row.budget.of(dense.visual_tokens): row.budget.label for row in comparison.rows}
        axes.set_xticks(list(ticks), labels=ticks.values())
        axes.minorticks_off()
    axes.set_title(task, fontsize=12 if large else 11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return named
