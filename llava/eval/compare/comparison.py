"""The numbers of a comparison: every run against the unpruned model on the same questions."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import mean

from llava.eval.benchmarks.benchmark import Benchmark
from llava.eval.compare.budget import Budget
from llava.eval.compare.costs import Cost
from llava.eval.compare.hard import HardCell, average
from llava.eval.compare.scores import Run, Score
from llava.eval.compare.suite_report import average_range, not_run
from llava.eval.scoring.bootstrap import Interval

AVERAGE = "average"


@dataclass
class Cell:
    """One run on one benchmark, or on the average of all.

    percent:  score as a share of its maximum
    range:    95 % interval of it, by bootstrap over images; None: there is nothing to draw
    change:   percent minus that of the unpruned model
    change_range: 95 % interval of the change, both scores on the same drawn images
    loyalty:  percent of answers that are those of the unpruned model
    count:    questions that the score is of
    failed:   questions that failed, which it is not of
    hard:     the run on the questions that smaller images get wrong; None: not known
    """

    percent: float
    range: Interval | None
    change: float
    change_range: Interval | None
    loyalty: float
    count: int
    metric: str = ""
    score: float | None = None
    failed: int = 0
    hard: HardCell | None = None


@dataclass
class Row:
    """One method at one budget; `cells` by benchmark and for the average.

    visual_tokens: kept per prompt on average over layers and over all questions
    answers_per_second: with the batches and the reuse of the run, where nothing interrupted it
    """

    method: str
    budget: Budget
    cells: dict[str, Cell]
    cost: Cost
    visual_tokens: float
    answers_per_second: float | None


@dataclass
class Comparison:
    """The unpruned model comes first; `missing` says in lines of text what was not run, and why."""

    settings: dict
    rows: list[Row]
    missing: list[str] = field(default_factory=list)

    @property
    def dense(self) -> Row:
        return self.rows[0]

    @property
    def tasks(self) -> list[str]:
        return [name for name in self.dense.cells if name != AVERAGE]

    def as_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Comparison:
        """From what `as_dict` made, numbers rounded or not. Raises ValueError on another form."""
        try:
            rows = [_row_from(row) for row in values["rows"]]
            return cls(values["settings"], rows, values["missing"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this is no comparison: {error!r}") from None


def _row_from(values: dict) -> Row:
    cells = {name: _cell_from(cell) for name, cell in values["cells"].items()}
    own = {"budget": Budget(**values["budget"]), "cells": cells, "cost": Cost(**values["cost"])}
    return Row(**(values | own))


def _cell_from(values: dict) -> Cell:
    hard = values["hard"]
    return Cell(**(values | {"hard": None if hard is None else HardCell(**hard)}))


def compare_runs(
    runs: list[Run],
    scores: list[Score],
    costs: dict[tuple, Cost],
    benchmarks: list[Benchmark],
    args,
) -> Comparison:
    """Scores and costs put together."""
    by_run: dict[tuple, list[Score]] = {}
    for score in scores:
        by_run.setdefault((score.method, score.budget), []).append(score)
    done = [run for run in runs if run.refused is None]
    rows = [_row(run, by_run[run.method, run.budget], costs) for run in done]
    names = ("model_name", "limit", "batch_size", "conv_mode")
    settings = {name: getattr(args, name) for name in names} | {
        "tokens": list(map(str, args.tokens))
    }
    return Comparison(settings, rows, not_run(runs))


def _row(run: Run, scores: list[Score], costs: dict[tuple, Cost]) -> Row:
    cells = {
        score.task: Cell(
            score.percent,
            score.range,
            score.change,
            score.change_range,
            score.same_as_dense,
            score.count,
            score.metric,
            score.score,
            score.failed,
            score.hard and score.hard.cell,
        )
        for score in scores
    }
    cost, answers = costs[run.method, run.budget], sum(score.answers for score in scores)
    seen = [(s.visual_tokens, s.count) for s in scores if s.visual_tokens is not None]
    kept = sum(tokens * count for tokens, count in seen) / max(sum(n for _, n in seen), 1)
    whole = all(score.seconds for score in scores)
    return Row(
        run.method,
        run.budget,
        {AVERAGE: _average(scores), **cells},
        cost,
        kept if seen else cost.tokens_mean,
        answers / sum(score.seconds for score in scores) if whole else None,
    )


def _average(scores: list[Score]) -> Cell:
    """The mean over benchmarks, each weighing the same."""
    return Cell(
        mean(score.percent for score in scores),
        average_range(scores),
        mean(score.change for score in scores),
        average_range(scores, "change_draws"),
        mean(score.same_as_dense for score in scores),
        sum(score.count for score in scores),
        failed=sum(score.failed for score in scores),
        hard=average([score.hard for score in scores if score.hard]),
    )
