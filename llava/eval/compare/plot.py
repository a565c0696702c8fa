"""Score against what it costs: one line per method, one picture per kind of cost.

A filled point differs significantly from the unpruned score, an open one does not.
"""

from __future__ import annotations

from itertools import cycle

from llava.eval.compare.comparison import AVERAGE, Comparison, Row
from llava.eval.compare.scores import DENSE
from llava.eval.compare.suite_report import mark_points
from llava.eval.plotting import import_pyplot
from llava.eval.scoring.bootstrap import is_significant

MARKERS = "osD^vP*X<>phH8d"
NOTE = "filled: significantly other than unpruned; open: not"
LABELS = {
    "tokens": "visual tokens per decoder layer (average)",
    "flops": "operations of the prefill, of the unpruned model's",
    "time": "time to the first token, of the unpruned model's",
}


def place(row: Row, dense: Row, axis: str) -> float:
    """Where a run stands on the axis."""
    if axis == "tokens":
        return row.visual_tokens
    if axis == "flops":
        return row.cost.flops / dense.cost.flops
    return row.cost.seconds / dense.cost.seconds


def plot(comparison: Comparison, axis: str, path: str) -> None:
    """Draws the averages over `axis` ("tokens", "flops" or "time"): all methods left, and every
    benchmark small. The bar on the right is the interval of the unpruned score."""
    pyplot = import_pyplot()
    tasks = comparison.tasks
    columns = max(1, -(-len(tasks) // 3))
    figure = pyplot.figure(figsize=(7 + 2.4 * columns, 7.2), layout="constrained")
    grid = figure.add_gridspec(3, columns + 3)
    large = figure.add_subplot(grid[:, :3])
    _panel(large, comparison, AVERAGE, axis, large=True)
    large.set(xlabel=LABELS[axis], ylabel="score (% of maximum)")
    for number, task in enumerate(tasks):
        axes = figure.add_subplot(grid[number % 3, 3 + number // 3])
        _panel(axes, comparison, task, axis)
        axes.tick_params(labelsize=7)
    handles, labels = large.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize="small"
    )
    figure.text(0.99, 0.005, NOTE, ha="right", fontsize="x-small", color="0.4")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axes, comparison: Comparison, task: str, axis: str, large: bool = False) -> None:
    dense = comparison.dense
    full = dense.cells[task]
    axes.axhline(full.percent, color="0.5", linestyle="--", linewidth=1, label="unpruned")
    if full.range is not None:
        axes.axhspan(*full.range, color="0.5", alpha=0.12, linewidth=0)
    methods = dict.fromkeys(row.method for row in comparison.rows if row.method != DENSE)
    colors = import_pyplot().get_cmap("tab20").colors
    for method, color, marker in zip(methods, cycle(colors), cycle(MARKERS), strict=False):
        rows = [row for row in comparison.rows if row.method == method]
        cells = [(place(row, dense, axis), row.cells[task]) for row in rows]
        points = sorted((x, c.percent, is_significant(c.change_range)) for x, c in cells)
        size, width = (6, 1.3) if large else (3, 0.8)
        xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
        # Drawn as the legend shows it, under the points that say what is significant.
        axes.plot(xs, ys, color=color, marker=marker, ms=size, linewidth=width, label=method)
        mark_points(axes, points, color, marker, size)
    if axis == "tokens":
        axes.set_xscale("log", base=2)
        ticks = {row.budget.of(dense.visual_tokens): row.budget.label for row in comparison.rows}
        axes.set_xticks(list(ticks), labels=ticks.values())
        axes.minorticks_off()
    axes.set_title(task, fontsize=11 if large else 9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
