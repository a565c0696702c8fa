"""The hard questions: those that smaller images get wrong at the same budget.

Where fewer pixels do as well, a question says little of how a method chooses its tokens
(`llava.eval.scoring.units.Units.hard`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import mean

from llava.eval.compare.budget import Budget
from llava.eval.scoring import paired
from llava.eval.scoring.bootstrap import Draws, Interval
from llava.eval.scoring.units import Units


@dataclass
class Hard:
    """A run on the hard questions of a benchmark.

    percent: score on them, as a share of its maximum
    change:  percent minus that of the unpruned model on them
    count:   how many there are that both answered
    change_draws: the change on drawn images
    """

    percent: float
    change: float
    count: int
    change_draws: Draws = field(repr=False, compare=False)

    @property
    def cell(self) -> HardCell:
        """What is shown of it."""
        return HardCell(self.percent, self.change, self.change_draws.range, self.count)


@dataclass
class HardCell:
    """A `Hard`, or the mean of several, with the 95 % interval of the change."""

    percent: float
    change: float
    change_range: Interval | None
    count: int


class HardQuestions:
    """What the runs on smaller images got right and wrong, by budget and benchmark."""

    def __init__(self):
        self.smaller: dict[tuple[Budget, str], Units] = {}

    def add(self, budget: Budget, units: Units) -> None:
        """Takes the units of a run on smaller images."""
        self.smaller[budget, units.name] = units

    def score(self, budget: Budget, own: Units, dense: Units) -> Hard | None:
        """A run at this budget, and the unpruned model, on the hard questions; None: there is no
        run on smaller images, or it leaves none."""
        smaller = self.smaller.get((budget, own.name))
        if smaller is None:
            return None
        own, dense = own.hard(smaller), dense.hard(smaller)
        answered = {unit.key for unit in dense.found if unit.weight}
        own = own.only({unit.key for unit in own.found if unit.weight} & answered)
        if not own.found:
            return None
        change = paired.compare(own, dense)
        return Hard(own.percent, change.percent, own.count, change.draws)


def average(found: list[Hard]) -> HardCell | None:
    """The mean over benchmarks, each weighing the same; None of none."""
    if not found:
        return None
    return HardCell(
        mean(hard.percent for hard in found),
        mean(hard.change for hard in found),
        paired.range_of_mean([hard.change_draws for hard in found]),
        sum(hard.count for hard in found),
    )
