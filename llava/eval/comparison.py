"""The numbers of a comparison: every run against the unpruned model on the same questions."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from statistics import mean
from zlib import crc32

import numpy as np

from llava.eval.benchmarks import Benchmark
from llava.eval.costs import Cost
from llava.eval.resampling import UNITS, Units, interval
from llava.eval.suite import Run, Score, answers_path
from llava.eval.suite_report import DENSE, not_run
from llava.eval.tasks import read_jsonl

AVERAGE = "average"


@dataclass
class Cell:
    """One run on one benchmark, or on the average of all.

    percent:  score as a share of its maximum
    range:    95 % interval of it; None: the benchmark has no units to draw
    change:   percent minus that of the unpruned model
    change_range: 95 % interval of the change, both scores drawn on the same questions
    loyalty:  percent of answers that are those of the unpruned model
    count:    questions
    """

    percent: float
    range: tuple[float, float] | None
    change: float
    change_range: tuple[float, float] | None
    loyalty: float
    count: int
    metric: str = ""
    score: float | None = None


@dataclass
class Row:
    """One method at one budget; tokens is the label, `cells` by benchmark and for the average.

    visual_tokens: kept per prompt on average over layers and over all questions
    answers_per_second: with the batches and the reuse of the run, where nothing interrupted it
    """

    method: str
    tokens: int
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


def compare_runs(
    runs: list[Run],
    scores: list[Score],
    costs: dict[tuple, Cost],
    benchmarks: list[Benchmark],
    args,
) -> Comparison:
    """Scores, answers on disk and costs put together."""
    done = [run for run in runs if run.refused is None]
    by_run: dict[tuple, list[Score]] = {}
    for score in scores:
        by_run.setdefault((score.method, score.tokens), []).append(score)
    dense_draws: dict[str, np.ndarray | None] = {}
    rows = []
    for run in done:
        key = run.method, run.tokens
        draws = {b.name: task_draws(b, answers_path(args.out, run, b), args) for b in benchmarks}
        if run.method == DENSE:
            dense_draws = draws
        dense = by_run[DENSE, done[0].tokens]
        rows.append(_row(run, by_run[key], dense, draws, dense_draws, costs))
    names = ("model_name", "limit", "batch_size", "conv_mode", "tokens")
    settings = {name: getattr(args, name) for name in names}
    return Comparison(settings, rows, not_run(runs))


def task_draws(benchmark: Benchmark, path: str, args) -> np.ndarray | None:
    """Scores of one answers file on drawn questions; runs of a benchmark draw the same ones."""
    if benchmark.name not in UNITS:
        return None
    questions = os.path.join(args.data_dir, benchmark.questions)
    units: Units = UNITS[benchmark.name](args.data_dir, questions, read_jsonl(path))
    return units.draws(seed=crc32(benchmark.name.encode()))


def _row(run, scores, dense_scores, draws, dense_draws, costs) -> Row:
    cells = {}
    for score, dense in zip(scores, dense_scores, strict=True):
        own, base = draws[score.task], dense_draws[score.task]
        cells[score.task] = Cell(
            score.percent,
            None if own is None else interval(own),
            score.percent - dense.percent,
            None if own is None else interval(own - base),
            score.same_as_dense,
            score.count,
            score.metric,
            score.score,
        )
    cost, counted = costs[run.method, run.tokens], sum(score.count for score in scores)
    seen = [(s.visual_tokens, s.count) for s in scores if s.visual_tokens is not None]
    kept = sum(tokens * count for tokens, count in seen) / max(sum(n for _, n in seen), 1)
    whole = all(score.seconds for score in scores)
    return Row(
        run.method,
        run.tokens,
        {AVERAGE: _average(cells, draws, dense_draws), **cells},
        cost,
        kept if seen else cost.tokens_mean,
        counted / sum(score.seconds for score in scores) if whole else None,
    )


def _average(cells: dict[str, Cell], draws, dense_draws) -> Cell:
    """The mean over benchmarks, each weighing the same."""
    known = [name for name in cells if draws[name] is not None]
    complete = len(known) == len(cells)
    own = np.mean([draws[name] for name in known], axis=0) if complete else None
    base = np.mean([dense_draws[name] for name in known], axis=0) if complete else None
    return Cell(
        mean(cell.percent for cell in cells.values()),
        interval(own) if complete else None,
        mean(cell.change for cell in cells.values()),
        interval(own - base) if complete else None,
        mean(cell.loyalty for cell in cells.values()),
        sum(cell.count for cell in cells.values()),
    )
