"""Questions with boxes and rewards, as the reinforcement asks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava.front_end import FrontEnd

from ..glimpse.batches import BoxDataset
from ..glimpse.data import BoxSample
from .rewards import JUDGED, Wanted, check_score_funcs
from .sampling import Asked


class QuestionDataset(BoxDataset):
    """An item is (question, what is wanted), see `Asked` and `Wanted`.

    boxes: whether the boxes of the samples say what is needed; samples without any, and all where
           False, have no mask
    """

    def __init__(
        self, samples: list[BoxSample], front: FrontEnd, frame: str = "seen", boxes: bool = True
    ):
        super().__init__(samples, front, frame)
        self.boxes, self._last = boxes, None

    def __getitem__(self, i: int) -> tuple[Asked, Wanted]:
        if self._last is None or self._last[0] != i:  # a group asks for the same one in a row
            self._last = i, self._item(i)
        return self._last[1]

    def _item(self, i: int) -> tuple[Asked, Wanted]:
        sample = self.samples[i]
        picture, mask = self.seen(sample)
        ids = self.texts(sample)["prompt"]
        asked = Asked(ids, picture, sample.question, mask if self.masked(sample) else None, i)
        return asked, Wanted(sample.question, sample.answer, sample.score_funcs)

    def masked(self, sample: BoxSample) -> bool:
        """Whether its boxes say what is needed of a sample."""
        return self.boxes and sample.boxes != []


@dataclass
class QuestionCollator:
    """Questions of a batch beside one another."""

    def __call__(self, items: Sequence[tuple[Asked, Wanted]]) -> dict[str, list]:
        asked, wanted = zip(*items, strict=True)
        return {"asked": list(asked), "wanted": list(wanted)}


def check_rewards(samples: Sequence[BoxSample], source: str) -> None:
    """Raises ValueError, naming the source, for rewards that there are not; see
    `check_score_funcs`."""
    for sample in samples:
        check_score_funcs(sample.score_funcs, sample.answer, source)


def needs_judge(samples: Sequence[BoxSample]) -> bool:
    return any(set(sample.score_funcs) & set(JUDGED) for sample in samples)
