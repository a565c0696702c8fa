"""What a suite runs and what comes of it: a method at a budget, and its score on a benchmark."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from llava.eval.compare.budget import Budget
from llava.eval.compare.hard import Hard
from llava.eval.scoring.bootstrap import Draws, Interval
from llava.pruning import Pruner

#: the method of the unpruned model
DENSE = "none"


@dataclass
class Run:
    """One method at one budget.

    refused: why it cannot run; None: it can
    """

    method: str
    budget: Budget
    pruner: Pruner | None
    refused: str | None = None


@dataclass
class Score:
    """One cell of the table.

    percent:       the score, as a share of its maximum, in percent
    count:         questions that it is of; `failed`: those that failed, which it is not of
    answers:       lines of the answers file that are answers, those that count 0 among them
    same_as_dense: share of answers that equal those of the unpruned model, in percent
    visual_tokens: image tokens of a prompt on average over the decoder's layers
    change:        percent minus that of the unpruned model, on the questions that both answered
    hard:          the same on the questions that smaller images get wrong; None: not known
    draws, change_draws: percent and change on drawn images; None: nothing to draw
    """

    method: str
    budget: Budget
    task: str
    metric: str
    score: float
    percent: float
    count: int
    same_as_dense: float | None = None
    visual_tokens: float | None = None
    seconds: float | None = None
    failed: int = 0
    answers: int = 0
    change: float = 0.0
    hard: Hard | None = None
    draws: Draws | None = field(default=None, repr=False, compare=False)
    change_draws: Draws | None = field(default=None, repr=False, compare=False)

    @property
    def range(self) -> Interval | None:
        """95 % interval of the score."""
        return self.draws and self.draws.range

    @property
    def change_range(self) -> Interval | None:
        """95 % interval of the change, both scores on the same images."""
        return self.change_draws and self.change_draws.range

    def as_dict(self) -> dict:
        """What is written of it: intervals in place of draws."""
        names = [f.name for f in fields(self) if not f.name.endswith("draws")]
        names.remove("budget")
        ranges = {"range": self.range, "change_range": self.change_range}
        ranges["hard"] = self.hard and asdict(self.hard.cell)
        return asdict(self.budget) | {name: getattr(self, name) for name in names} | ranges
