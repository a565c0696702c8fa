"""The runs of a comparison grouped by what they cost, whatever budget was asked for.

A budget means different things to different methods: tokens that enter the decoder, tokens behind
a cut, a bound. What every run has is the visual tokens per decoder layer, on average over layers
and questions.
"""

from __future__ import annotations

from dataclasses import dataclass

from llava.eval.compare.comparison import AVERAGE, Comparison, Row
from llava.eval.compare.scores import DENSE

#: upper bounds of the groups but the last, as shares of the unpruned model's tokens
BOUNDS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
#: how far above a bound a run still belongs to it: budgets are rounded up here and there
ROUNDED = 1.02


@dataclass
class Group:
    """Runs of about the same cost, best average first.

    least, most: visual tokens per decoder layer between which they lie
    """

    least: float
    most: float
    rows: list[Row]

    @property
    def title(self) -> str:
        if not self.least:
            return f"up to {self.most:.0f} visual tokens per layer"
        return f"{self.least:.0f} to {self.most:.0f} visual tokens per layer"


def by_cost(comparison: Comparison) -> list[Group]:
    """The groups that have runs, the most tokens first."""
    whole = comparison.dense.visual_tokens
    edges = [0.0, *(share * whole for share in BOUNDS), whole]
    groups = [Group(*pair, []) for pair in zip(edges, edges[1:], strict=False)]
    for row in comparison.rows:
        if row.method != DENSE:
            fits = (g for g in groups if row.visual_tokens <= g.most * ROUNDED)
            next(fits, groups[-1]).rows.append(row)
    for group in groups:
        group.rows.sort(key=lambda row: -row.cells[AVERAGE].percent)
    return [group for group in reversed(groups) if group.rows]
