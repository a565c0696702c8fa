"""What a scorer returns: the questions of a set of answers, as their benchmark counts them.

The score, its parts by group, its interval over images (`bootstrap`), the agreement of two runs
(`paired`) and the score on the hard questions are all made of these units.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple
from zlib import crc32

import numpy as np

from llava.eval.files.matching import question_id
from llava.eval.scoring.bootstrap import DRAWS, Draws, by_image, draw

#: places in sums over units; the sums of the counts follow
VALUE, WEIGHT, COUNTS = 0, 1, 2


class Unit(NamedTuple):
    """A question that was answered, or several that are scored as one.

    key:    what identifies it among the units of its benchmark
    value:  how right the answer is, from 0 to 1
    said:   the answer word for word, or those to its several questions
    image:  name of the image it is about; None: it stands alone
    groups: what it is reported under; a macro score is the mean over the first of them
    weight: how often it counts; 0: it is reported, but no part of the score
    counts: further numbers, for a score that is a function of their sums
    """

    key: Hashable
    value: float
    said: str | tuple[str, ...]
    image: str | None = None
    groups: tuple[str, ...] = ()
    weight: float = 1
    counts: tuple[float, ...] = ()


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Quotients, 0 over nothing."""
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=np.asarray(whole) > 0)


def mean(sums: np.ndarray) -> np.ndarray:
    """The weighted mean of the values in percent: (..., K) sums -> (...)."""
    return ratio(100 * sums[..., VALUE], sums[..., WEIGHT])


def mean_by_share(sums: np.ndarray) -> np.ndarray:
    """`mean` with the last digit of scorers that take the percentage of a quotient."""
    return 100 * ratio(sums[..., VALUE], sums[..., WEIGHT])


@dataclass
class Units:
    """The units of a set of answers, and the rule by which they make a score.

    found:   in the order of the answers
    rule:    (..., K) sums of value * weight, weight, and each of the counts -> (...) scores in
             percent of the maximum
    macro:   the score is the mean over the (first) groups, not that of all units
    groups:  names of the groups in the order of the report, those that have no units among them;
             (): those of the units, sorted
    details: what else a result says, or says otherwise: `score` where it is no percentage, `metric`
             where it depends on the answers
    name:    of the benchmark; all sets of answers to it draw the same images
    """

    found: list[Unit]
    rule: Callable[[np.ndarray], np.ndarray] = mean
    macro: bool = False
    groups: tuple[str, ...] = ()
    details: dict = field(default_factory=dict)
    name: str = ""

    @cached_property
    def sums(self) -> tuple[float, ...]:
        """Sums over all units: value * weight, weight, and each of the counts."""
        # In the order of the answers, as the reference scorers add up.
        return tuple(map(sum, zip(*map(_row, self.found), strict=True))) or (0, 0)

    @cached_property
    def percent(self) -> float:
        """The score in percent of the maximum; 0 without answers."""
        if not self.found:
            return 0.0
        if not self.macro:
            return float(self.rule(np.array(self.sums, float)))
        parts = [part.percent for part in self.by_group(first=True).values() if part.found]
        return sum(parts) / len(parts)

    @cached_property
    def draws(self) -> Draws:
        """The score on drawn images; all sets of answers to a benchmark draw alike."""
        return self.draw(seed=crc32(self.name.encode()))

    def draw(self, seed: int, count: int = DRAWS) -> Draws:
        """The score on images drawn anew; see `bootstrap.draw`."""
        units = [unit for unit in self.found if unit.weight]
        names = [unit.groups[0] if self.macro else "" for unit in units]
        numbers = {name: number for number, name in enumerate(sorted(set(names)))}
        groups = np.array([numbers[name] for name in names], np.intp)
        sums = by_image([u.image for u in units], groups, np.array(list(map(_row, units)), float))
        return draw(sums, self._score, seed, count)

    def _score(self, sums: np.ndarray) -> np.ndarray:
        """(R, C, K) sums of R draws over C groups -> (R,) scores; a group that a draw has nothing
        of does not count in its mean."""
        present = sums[..., WEIGHT] > 0
        return ratio((self.rule(sums) * present).sum(axis=1), present.sum(axis=1))

    @property
    def count(self) -> int:
        """How many questions the score is of."""
        return int(self.sums[WEIGHT])

    def by_group(self, first: bool = False) -> dict[str, Units]:
        """The units of every group, by name; first: of the groups of a macro score only."""
        parts: dict[str, list[Unit]] = {name: [] for name in self.groups}
        for unit in self.found:
            for name in unit.groups[: 1 if first else None]:
                parts.setdefault(name, []).append(unit)
        return {name: Units(parts[name], self.rule) for name in self.groups or sorted(parts)}

    def only(self, keys: Collection[Hashable]) -> Units:
        """The units with these keys; details are of the whole, and are left out."""
        found = [unit for unit in self.found if unit.key in keys]
        if len(found) == len(self.found):
            return self
        return replace(self, found=found, details={})

    def about(self, questions: list) -> Units:
        """Every unit with its image: where it names none, that of the question whose id is its key.

        questions: `Question`s as they were asked
        """
        images = {question_id(q.head): q.images for q in questions if q.images}
        names = {key: own[0] if len(own) == 1 else repr(own) for key, own in images.items()}
        found = (u if u.image else u._replace(image=names.get(u.key)) for u in self.found)
        return replace(self, found=list(found))

    def hard(self, downsampled: Units) -> Units:
        """The hard subset: units that a run on down-sampled images, given as `downsampled`, got at
        most half right. The others say little of how well a method chooses its tokens, as fewer
        pixels do for them."""
        return self.only({unit.key for unit in downsampled.found if unit.value <= 0.5})

    def result(self) -> dict:
        """Returns `{"score", "percent", "count", "groups"?}` and the details.

        groups: score in percent and count by name
        """
        parts = {name: [part.percent, part.count] for name, part in self.by_group().items()}
        scores = {"score": self.percent, "percent": self.percent, "count": self.count}
        return scores | ({"groups": parts} if parts else {}) | self.details


def _row(unit: Unit) -> tuple[float, ...]:
    return (unit.value * unit.weight, unit.weight, *unit.counts)


def accuracy_report(units: Units) -> str:
    """The text of a plain accuracy, group by group."""
    lines = [f"  {name}: {part.percent:.2f}%\n" for name, part in units.by_group().items()]
    return f"Samples: {units.count}\nAccuracy: {units.percent:.2f}%\n" + "".join(lines)
