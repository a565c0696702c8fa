"""How far a score would move with other images: intervals by bootstrap, paired between runs.

Questions about one image stand or fall together, so that what is drawn again are images, with all
their questions. Scores are functions of sums over images: a draw is a weighted sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count as counter

import numpy as np

DRAWS = 2000
LEVEL = 0.95
#: images of that many draws are in memory at a time
CHUNK = 2**20
#: rounding in sums
TOLERANCE = 1e-9

Interval = tuple[float, float]


@dataclass(frozen=True)
class Draws:
    """(R,) scores in percent on drawn images, out of so many images."""

    scores: np.ndarray
    images: int

    def minus(self, other: Draws) -> Draws:
        return Draws(self.scores - other.scores, self.images)

    @property
    def range(self) -> Interval | None:
        """95 % interval; None when there is one image, which says nothing of others."""
        return interval(self.scores) if self.images > 1 else None


def draw(
    sums: np.ndarray, score: Callable[[np.ndarray], np.ndarray], seed: int, count: int = DRAWS
) -> Draws:
    """Scores of as many images drawn with replacement, questions and all.

    sums:  (G, ...) what every image adds to the sums that a score is made of
    score: (R, ...) sums -> (R,) scores in percent of the maximum
    Equal seeds draw the same images, where the number of images is the same.
    """
    size, rng = len(sums), np.random.default_rng(seed)
    chunk = max(1, CHUNK // size)
    totals = np.empty((count, *sums.shape[1:]))
    for start in range(0, count, chunk):
        rows = min(chunk, count - start)
        drawn = rng.integers(size, size=(rows, size))
        drawn += size * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
        totals[start : start + rows] = np.tensordot(times, sums, axes=1)
    return Draws(score(totals), size)


def by_image(images: list[str | None], groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(G, C, K) what the units about each of G images add to the sums of each of C groups; images
    in the order of their names.

    images: of every unit; None: it stands alone
    groups: (U,) numbers of their groups
    values: (U, K) their parts of the sums
    The order of the units makes no difference. Raises ValueError when there are none.
    """
    if not images:
        raise ValueError("there are no answers to draw an interval from")
    alone = counter()
    names = [f"question {next(alone)}" if image is None else image for image in images]
    found = sorted(set(names))  # no array: a picture that is its own name takes 100 kB
    number = {name: place for place, name in enumerate(found)}
    place = np.fromiter((number[name] for name in names), dtype=np.intp, count=len(names))
    # Sums of the same numbers in another order may differ in the last digit.
    order = np.lexsort((*values.T, groups, place))
    shape = (len(found), int(groups.max()) + 1)
    cells = np.ravel_multi_index((place[order], groups[order]), shape)
    columns = [np.bincount(cells, column[order], np.prod(shape)) for column in values.T]
    return np.stack(columns, axis=1).reshape(*shape, -1)


def interval(draws: np.ndarray) -> Interval:
    """The middle 95 % of the draws."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def is_significant(change: Interval | None) -> bool:
    """Whether the interval of a change leaves out 0."""
    return change is not None and (change[0] > TOLERANCE or change[1] < -TOLERANCE)
