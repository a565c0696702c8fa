"""A run against the unpruned one on a benchmark: the same questions, the same images drawn."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import numpy as np

from llava.eval.benchmarks.benchmark import Benchmark
from llava.eval.benchmarks.resampling import UNITS
from llava.eval.files.answer_lines import is_failed
from llava.eval.scoring.bootstrap import Interval, interval


@dataclass
class Draws:
    """(2000,) scores in percent on drawn images, out of so many images."""

    scores: np.ndarray
    images: int

    def minus(self, other: Draws) -> Draws:
        return Draws(self.scores - other.scores, self.images)

    @property
    def range(self) -> Interval | None:
        """95 % interval; None when there is one image, which says nothing of others."""
        return interval(self.scores) if self.images > 1 else None


def range_of_mean(draws: list[Draws | None]) -> Interval | None:
    """95 % interval of the mean over benchmarks; None when one has nothing to draw, or none has
    more than one image."""
    if any(own is None for own in draws) or not any(own.images > 1 for own in draws):
        return None
    return interval(np.mean([own.scores for own in draws], axis=0))


@dataclass
class Drawn:
    """A score and its change against the unpruned model.

    draws:        of the score; None: the benchmark has no units to draw
    change:       score minus that of the unpruned model, on the questions that both answered
    change_draws: of the change, both scores on the same images; None as for draws
    same:         share of answers that equal those of the unpruned model, in percent
    """

    draws: Draws | None
    change: float
    change_draws: Draws | None
    same: float


@dataclass
class Baseline:
    """The records of the unpruned model's answers to a benchmark, and its score."""

    records: list[dict]
    percent: float
    draws: Draws | None


def draw(benchmark: Benchmark, data_dir: str, path: str, records: list[dict]) -> Draws | None:
    """Scores of a set of answers on drawn images; all runs of a benchmark draw alike.

    path:    question file
    records: lines of an answers file; questions that failed are left out
    None where the benchmark has no units.
    """
    if benchmark.name not in UNITS:
        return None
    units = UNITS[benchmark.name](data_dir, path, benchmark.counted(records))
    return Draws(units.draws(seed=crc32(benchmark.name.encode())), len(units.images))


def compare(
    benchmark: Benchmark,
    data_dir: str,
    path: str,
    records: list[dict],
    percent: float,
    dense: Baseline,
) -> Drawn:
    """Sets a run against the unpruned one.

    records: all lines of the run's answers file, in the order of the questions
    percent: the run's score
    """
    pairs = list(zip(records, dense.records, strict=True))
    both = [(own, base) for own, base in pairs if not (is_failed(own) or is_failed(base))]
    if not both:
        raise ValueError(
            f"{benchmark.name}: no question was answered by this run and by the unpruned model"
        )
    same = 100 * sum(own["text"] == base["text"] for own, base in both) / len(both)
    itself = records is dense.records
    draws = dense.draws if itself else draw(benchmark, data_dir, path, records)
    base_percent, own_percent, base_draws, own_draws = dense.percent, percent, dense.draws, draws
    if any(is_failed(own) != is_failed(base) for own, base in pairs):
        # What changed is seen on the questions that both answered.
        own_records = [base if is_failed(base) else own for own, base in pairs]
        base_records = [own if is_failed(own) else base for own, base in pairs]
        own_percent = _percent(benchmark, data_dir, path, own_records)
        base_percent = _percent(benchmark, data_dir, path, base_records)
        own_draws = draw(benchmark, data_dir, path, own_records)
        base_draws = draw(benchmark, data_dir, path, base_records)
    known = own_draws is not None and base_draws is not None
    change_draws = own_draws.minus(base_draws) if known else None
    return Drawn(draws, own_percent - base_percent, change_draws, same)


def _percent(benchmark: Benchmark, data_dir: str, path: str, records: list[dict]) -> float:
    return benchmark.evaluated(data_dir, path, benchmark.counted(records))["percent"]
