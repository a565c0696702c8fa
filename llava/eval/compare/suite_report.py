"""What a suite shows of its scores: a Markdown table and a plot.

Bold, and filled in the plot, is a score whose change against the unpruned model is significant: the
95 % interval of the change, by bootstrap over images, leaves out 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from statistics import mean

from llava.eval import markdown
from llava.eval.compare.budget import Budget
from llava.eval.compare.cells import bold, in_brackets
from llava.eval.compare.hard import average as average_hard
from llava.eval.compare.scores import DENSE, Run, Score
from llava.eval.plotting import import_pyplot
from llava.eval.scoring.bootstrap import Interval, is_significant
from llava.eval.scoring.paired import range_of_mean

AVERAGE = "average"
#: names that a list in brackets has at least, besides its last one, to be left out of a page
LONG_LIST = 5


def table(scores: list[Score]) -> str:
    """Returns one Markdown table per method: tasks down, budgets across, averages below.

    The first column of numbers is the unpruned model; bold scores differ from it significantly.
    """
    dense = [score for score in scores if score.method == DENSE]
    methods = list(dict.fromkeys(s.method for s in scores if s.method != DENSE)) or [DENSE]
    return "\n".join(_method_table(method, dense, scores) for method in methods)


def _method_table(method: str, dense: list[Score], scores: list[Score]) -> str:
    own = [score for score in scores if score.method == method and method != DENSE]
    budgets = sorted({score.budget for score in own}, key=lambda b: b.order, reverse=True)
    columns = [dense] + [[s for s in own if s.budget == budget] for budget in budgets]
    head = ["task", "metric", *(column[0].budget.title for column in columns)]
    rows = [
        [task.task, task.metric, *(_cell(column, task.task) for column in columns)]
        for task in dense
    ]
    averages = [average(column) for column in columns]
    rows.append([f"**{AVERAGE}**", "", *map(_average_cell, columns)])
    rows.append(["95 % interval", "", *(in_brackets(average_range(c)) for c in columns)])
    changes = [mean(score.change for score in column) for column in columns]
    rows.append(["change", "", *(f"{value:+.1f}" for value in changes)])
    changes = (in_brackets(average_range(column, "change_draws")) for column in columns)
    rows.append(["95 % interval", "", *changes])
    shares = [100 * value / averages[0] if averages[0] else 0.0 for value in averages]
    rows.append(["of the unpruned score", "%", *(f"{share:.1f}" for share in shares)])
    if any(score.hard for column in columns for score in column):
        hard = [average_hard([score.hard for score in column if score.hard]) for column in columns]
        texts = (bold(f"{cell.percent:.1f}", cell.change_range) if cell else "" for cell in hard)
        rows.append(["on hard questions", "", *texts])
    if any(score.failed for column in columns for score in column):
        rows.append(["questions that failed", "", *(_failed(column) for column in columns)])
    rows.append(["answers as unpruned", "%", *(_mean(c, "same_as_dense") for c in columns)])
    rows.append(["visual tokens per layer", "", *(_mean(c, "visual_tokens") for c in columns)])
    rows.append(["answers per second", "", *(_rate(column) for column in columns)])
    title = (
        f"**{method}** (scores in percent of the maximum; bold: significantly other than unpruned)"
    )
    return f"{title}\n\n{markdown.table(head, rows, 'llr')}\n"


def not_run(runs: list[Run]) -> list[str]:
    """Returns one line for every reason why runs are missing, with their budgets."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        if run.refused is not None:
            # The same reason may name the budget: it is one reason all the same.
            reason = brief(run.refused.replace(f"({run.budget})", "(N)"))
            reasons.setdefault((run.method, reason), []).append(run.budget.label)
    return [
        f"- `{method}` was not run at {', '.join(labels)}: {reason}"
        for (method, reason), labels in reasons.items()
    ]


def brief(reason: str) -> str:
    """A reason without long lists of names in brackets, which help who types a command and nobody
    who reads a page."""
    return re.sub(rf" \((?:[\w+.-]+, ){{{LONG_LIST},}}[\w+.-]+\)", "", reason)


def average(column: list[Score]) -> float:
    """Returns the mean over tasks, each weighing the same, in percent."""
    return mean(score.percent for score in column) if column else 0.0


def average_range(column: list[Score], name: str = "draws") -> Interval | None:
    """Returns the 95 % interval of the average of scores, or of changes ("change_draws")."""
    return range_of_mean([getattr(score, name) for score in column])


def _cell(column: list[Score], task: str) -> str:
    score = next((score for score in column if score.task == task), None)
    if score is None:
        return ""
    text = bold(f"{score.percent:.1f}", score.change_range)
    return f"{text} ({score.failed} failed)" if score.failed else text


def _average_cell(column: list[Score]) -> str:
    return bold(f"{average(column):.1f}", average_range(column, "change_draws"))


def _failed(column: list[Score]) -> str:
    return str(sum(score.failed for score in column))


def _mean(column: list[Score], name: str) -> str:
    values = [value for score in column if (value := getattr(score, name)) is not None]
    return f"{mean(values):.1f}" if values else ""


def _rate(column: list[Score]) -> str:
    """Answers per second, where the whole column was answered without interruption."""
    if any(score.seconds is None for score in column):
        return ""
    return f"{sum(s.answers for s in column) / sum(s.seconds for s in column):.1f}"


def plot(scores: list[Score], path: str) -> None:
    """Draws score over token budget: the average large, every task small; one line per method.

    The band around an average is its 95 % interval; a filled point differs significantly from the
    unpruned score, an open one does not.
    """
    pyplot = import_pyplot()
    tasks = list(dict.fromkeys(score.task for score in scores))
    columns = min(max(-(-len(tasks) // 2), 1), 4)
    rows = max(2, -(-len(tasks) // columns))
    figure = pyplot.figure(figsize=(5 + 2.3 * columns, 2.4 * rows + 0.4), layout="constrained")
    grid = figure.add_gridspec(rows, columns + 2)
    large = figure.add_subplot(grid[:, :2])
    _panel(large, scores, "average over tasks", band=True)
    large.set(xlabel="visual tokens per image", ylabel="score (% of maximum)")
    large.legend(frameon=False, loc="lower right")
    first = None
    for number, task in enumerate(tasks):
        place = grid[number // columns, 2 + number % columns]
        axes = first = figure.add_subplot(place, sharey=first)
        _panel(axes, [score for score in scores if score.task == task], task)
        axes.tick_params(labelsize=7)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _panel(axes, scores: list[Score], title: str, band: bool = False) -> None:
    """One set of curves: the mean of `scores` at every budget, by method."""
    curves = _curves(scores, _whole(scores))
    full = curves.pop(DENSE)[0]
    axes.axhline(full.percent, color="0.6", linestyle="--", linewidth=1, label="unpruned")
    for method, points in curves.items():
        points = [*points, full]
        tokens, values = [p.tokens for p in points], [p.percent for p in points]
        (line,) = axes.plot(tokens, values, "-", label=method)
        mark_points(axes, [(p.tokens, p.percent, p.significant) for p in points], line.get_color())
        if band and all(point.range for point in points):
            low, high = zip(*(point.range for point in points), strict=True)
            axes.fill_between(tokens, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    ticks = {point.tokens: point.label for points in curves.values() for point in (*points, full)}
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ticks), labels=ticks.values())
    axes.minorticks_off()
    axes.set_title(title, fontsize=11 if band else 9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def mark_points(
    axes, points: list[tuple[float, float, bool]], color, marker: str = "o", size: float = 4
) -> None:
    """Draws (x, y, significant): filled where the change is significant, open where not."""
    for x, y, filled in points:
        face = color if filled else "white"
        axes.plot([x], [y], marker, markersize=size, color=color, markerfacecolor=face)


@dataclass
class Point:
    """The average of a method's scores at one budget.

    tokens:      the budget; of a share, of what the images have on average
    label:       how the budget is called
    range:       95 % interval of it
    significant: whether its change against the unpruned model is
    """

    tokens: float
    label: str
    percent: float
    range: Interval | None
    significant: bool


def _whole(scores: list[Score]) -> float:
    """Tokens that an image has, or a prompt where images differ, on average over benchmarks."""
    seen = [s.visual_tokens for s in scores if s.method == DENSE and s.visual_tokens is not None]
    return mean(seen) if seen else 1.0


def _curves(scores: list[Score], whole: float) -> dict[str, list[Point]]:
    """Points by method, small budgets first; whole: tokens of an image."""
    groups: dict[str, dict[Budget, list[Score]]] = {}
    for score in scores:
        groups.setdefault(score.method, {}).setdefault(score.budget, []).append(score)
    return {
        method: sorted(
            (_point(budget, whole, column) for budget, column in budgets.items()),
            key=lambda point: point.tokens,
        )
        for method, budgets in groups.items()
    }


def _point(budget: Budget, whole: float, column: list[Score]) -> Point:
    significant = is_significant(average_range(column, "change_draws"))
    return Point(
        budget.of(whole), budget.label, average(column), average_range(column), significant
    )
