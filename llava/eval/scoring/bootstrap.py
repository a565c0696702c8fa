"""How far a score would move with other images: intervals by bootstrap, paired between runs.

Questions about one image stand or fall together, so that what is drawn again are images, with all
their questions. Scores are functions of sums over images: a draw is a weighted sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
class Units:
    """One set of answers as its benchmark counts it.

    sums:   (G, K) what the questions about every image add to the sums the score is made of
    score:  (R, K) sums -> (R,) scores in percent of the maximum
    images: (G,) names of the images, in order; what is drawn depends on how many there are
    """

    sums: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]
    images: tuple[str, ...]

    @property
    def percent(self) -> float:
        return float(self.score(self.sums.sum(axis=0, keepdims=True))[0])

    def draws(self, seed: int, count: int = DRAWS) -> np.ndarray:
        """(count,) scores of as many images drawn with replacement, questions and all.

        Equal seeds draw the same images, where the number of images is the same.
        """
        size, draw = len(self.sums), np.random.default_rng(seed)
        chunk = max(1, CHUNK // max(size, 1))
        totals = np.empty((count, self.sums.shape[1]))
        for start in range(0, count, chunk):
            rows = min(chunk, count - start)
            drawn = draw.integers(size, size=(rows, size))
            drawn += size * np.arange(rows)[:, None]
            times = np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size)
            totals[start : start + rows] = times @ self.sums
        return self.score(totals)


def by_image(
    values: Iterable[Sequence[float]],
    images: Iterable[str | None],
    score: Callable[[np.ndarray], np.ndarray],
) -> Units:
    """Units out of single questions.

    values: per question, its K parts of the sums
    images: per question, the image it is about; None: a question on its own
    The order of the questions makes no difference. Raises ValueError when there are none.
    """
    values = np.asarray(list(values), dtype=float)
    if not len(values):
        raise ValueError("there are no answers to draw an interval from")
    alone = counter()
    names = [f"question {next(alone)}" if image is None else str(image) for image in images]
    found = sorted(set(names))  # no array: a picture that is its own name takes 100 kB
    number = {name: place for place, name in enumerate(found)}
    place = np.fromiter((number[name] for name in names), dtype=np.intp, count=len(names))
    # Sums of the same numbers in another order may differ in the last digit.
    order = np.lexsort((*values.T, place))
    place, values = place[order], values[order]
    columns = (np.bincount(place, weights=column, minlength=len(found)) for column in values.T)
    return Units(np.stack(list(columns), axis=1), score, tuple(found))


def mean_of(points: Sequence[float], images: Iterable[str | None] | None = None) -> Units:
    """Units of a benchmark that averages points from 0 to 1; images: as for `by_image`."""
    points = np.asarray(points, dtype=float)
    values = np.stack([points, np.ones(len(points))], axis=1)
    return by_image(values, [None] * len(points) if images is None else images, _mean)


def _mean(sums: np.ndarray) -> np.ndarray:
    return 100 * ratio(sums[:, 0], sums[:, 1])


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Quotients, 0 over nothing."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def mean_where(scores: np.ndarray, present: np.ndarray) -> np.ndarray:
    """(R,) means of the scores (R, C) that are present; a category that a draw has nothing of does
    not count in it."""
    return ratio((scores * present).sum(axis=1), present.sum(axis=1).astype(float))


def interval(draws: np.ndarray) -> Interval:
    """The middle 95 % of the draws."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def is_significant(change: Interval | None) -> bool:
    """Whether the interval of a change leaves out 0."""
    return change is not None and (change[0] > TOLERANCE or change[1] < -TOLERANCE)
