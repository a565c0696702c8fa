"""A run against the unpruned one on a benchmark: the same questions, the same images drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llava.eval.scoring.bootstrap import Draws, Interval, interval
from llava.eval.scoring.units import Unit, Units


@dataclass
class Change:
    """What a run changes against the unpruned one, on the questions that both answered.

    percent: score minus that of the unpruned model
    draws:   of it, both scores on the same images
    same:    share of answers that equal those of the unpruned model, in percent
    """

    percent: float
    draws: Draws
    same: float


def compare(own: Units, dense: Units) -> Change:
    """Sets a run against the unpruned one.

    Raises ValueError when there is no question that both answered.
    """
    both = {unit.key for unit in own.found} & {unit.key for unit in dense.found}
    if not both:
        raise ValueError(
            f"{own.name}: no question was answered by this run and by the unpruned model"
        )
    own, dense = own.only(both), dense.only(both)
    draws = own.draws.minus(dense.draws)
    return Change(own.percent - dense.percent, draws, agreement(own, dense))


def agreement(own: Units, other: Units) -> float:
    """Share of the answers that count which are the same in both, word for word, in percent."""
    theirs = {unit.key: _texts(unit) for unit in other.found}
    pairs = [
        pair
        for unit in own.found
        if unit.weight and unit.key in theirs
        for pair in zip(_texts(unit), theirs[unit.key], strict=True)
    ]
    return 100 * sum(one == two for one, two in pairs) / max(len(pairs), 1)


def _texts(unit: Unit) -> tuple[str, ...]:
    return (unit.said,) if isinstance(unit.said, str) else unit.said


def range_of_mean(draws: list[Draws | None]) -> Interval | None:
    """95 % interval of the mean over benchmarks; None when one has nothing to draw, or none has
    more than one image."""
    if any(own is None for own in draws) or not any(own.images > 1 for own in draws):
        return None
    return interval(np.mean([own.scores for own in draws], axis=0))
