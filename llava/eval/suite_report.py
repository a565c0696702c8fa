"""What a suite shows of its scores: a Markdown table and a plot."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava.eval.suite import Score

DENSE = "none"
AVERAGE = "average"


def table(scores: list[Score]) -> str:
    """Returns one Markdown table per method: tasks down, budgets across, averages below.

    The first column of numbers is the unpruned model.
    """
    dense = [score for score in scores if score.method == DENSE]
    methods = list(dict.fromkeys(s.method for s in scores if s.method != DENSE)) or [DENSE]
    return "\n".join(_method_table(method, dense, scores) for method in methods)


def _method_table(method: str, dense: list[Score], scores: list[Score]) -> str:
    own = [score for score in scores if score.method == method and method != DENSE]
    budgets = sorted({score.tokens for score in own}, reverse=True)
    columns = [dense] + [[s for s in own if s.tokens == tokens] for tokens in budgets]
    head = ["task", "metric", *(f"{column[0].tokens} tokens" for column in columns)]
    rows = [
        [task.task, task.metric, *(_cell(column, task.task) for column in columns)]
        for task in dense
    ]
    averages = [average(column) for column in columns]
    rows.append([f"**{AVERAGE}**", "", *(f"**{value:.1f}**" for value in averages)])
    shares = [100 * value / averages[0] if averages[0] else 0.0 for value in averages]
    rows.append(["of the unpruned score", "%", *(f"{share:.1f}" for share in shares)])
    rows.append(["answers as unpruned", "%", *(_mean(c, "same_as_dense") for c in columns)])
    rows.append(["visual tokens per layer", "", *(_mean(c, "visual_tokens") for c in columns)])
    rows.append(["answers per second", "", *(_rate(column) for column in columns)])
    lines = [f"**{method}** (scores in percent of the maximum)", "", _row(head)]
    lines.append(_row(["---", "---", *("---:" for _ in columns)]))
    return "\n".join([*lines, *map(_row, rows)]) + "\n"


def average(column: list[Score]) -> float:
    """Returns the mean over tasks, each weighing the same, in percent."""
    return mean(score.percent for score in column) if column else 0.0


def _cell(column: list[Score], task: str) -> str:
    return next((f"{score.percent:.1f}" for score in column if score.task == task), "")


def _mean(column: list[Score], name: str) -> str:
    values = [value for score in column if (value := getattr(score, name)) is not None]
    return f"{mean(values):.1f}" if values else ""


def _rate(column: list[Score]) -> str:
    """Answers per second, where the whole column was answered without interruption."""
    if any(score.seconds is None for score in column):
        return ""
    return f"{sum(s.count for s in column) / sum(s.seconds for s in column):.1f}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def import_pyplot():
    """Returns matplotlib's pyplot, drawing into files only; it belongs to the extra `eval`."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("matplotlib is missing: pip install -e '.[eval]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(scores: list[Score], path: str) -> None:
    """Draws score over token budget: the average large, every task small; one line per method."""
    pyplot = import_pyplot()
    tasks = list(dict.fromkeys(score.task for score in scores))
    columns = 3
    rows = max(2, -(-(len(tasks)) // columns))
    figure = pyplot.figure(figsize=(4 + 2.6 * columns, 2.3 * rows + 0.6), layout="constrained")
    grid = figure.add_gridspec(rows, columns + 2)
    large = figure.add_subplot(grid[:, :2])
    _panel(large, scores, None)
    large.set_ylabel("score (% of maximum)")
    large.legend(frameon=False, loc="lower right")
    for number, task in enumerate(tasks):
        axes = figure.add_subplot(grid[number // columns, 2 + number % columns])
        _panel(axes, scores, task)
        axes.tick_params(labelsize=7)
    large.set_xlabel("visual tokens per image")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axes, scores: list[Score], task: str | None) -> None:
    """One set of curves; `task` None draws the average over all tasks."""
    curves = _curves([score for score in scores if task in (None, score.task)])
    (full, value), *_ = curves.pop(DENSE)
    axes.axhline(value, color="0.6", linestyle="--", linewidth=1, label="unpruned")
    for method, points in curves.items():
        axes.plot(*zip(*sorted([*points, (full, value)]), strict=True), "o-", ms=4, label=method)
    axes.set_xscale("log", base=2)
    ticks = sorted({tokens for points in curves.values() for tokens, _ in points} | {full})
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()
    axes.set_title(task or "average over tasks", fontsize=9 if task else 11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _curves(scores: list[Score]) -> dict[str, list[tuple[int, float]]]:
    """Points (tokens, percent) by method; several tasks at one budget are averaged."""
    groups: dict[str, dict[int, list[Score]]] = {}
    for score in scores:
        groups.setdefault(score.method, {}).setdefault(score.tokens, []).append(score)
    return {
        method: [(tokens, average(column)) for tokens, column in budgets.items()]
        for method, budgets in groups.items()
    }
