"""Sinks: patches of very large norm, where the tower keeps what holds for the whole image.

Class tokens look at them because of their norm, not of what they show. Methods that choose by such
attention may leave them out (`SinkFilter`).

Paper: SinkPruner, https://arxiv.org/abs/2609.01004
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .extras import with_extra, without_extra
from .ops import gather_tokens, on_device, top_stable, true_first
from .tokens import VisionTokens

#: the extra, on the way to the projector, that is True on the patches that are left out
LEFT_OUT = "left_out"
#: likewise, the norm of every token as the tower gives it
NORMS = "norms"


def check_sink_ratio(sink_ratio: float) -> None:
    """Raises ValueError unless this is a share of patches that leaves some."""
    if isinstance(sink_ratio, bool) or not 0 <= sink_ratio < 1:
        raise ValueError(
            f"sink_ratio ({sink_ratio!r}) must lie between 0, where no patch is left out, and "
            "below 1"
        )


def num_sinks(num_patches: int, sink_ratio: float) -> int:
    """Patches of a crop that are sinks: a share of them, rounded up."""
    return math.ceil(round(num_patches * sink_ratio, 9))


def sinks(features: Tensor, count: int) -> Tensor:
    """Places (B, count) of the largest Euclidean norms of features (B, N, C); equal ones: the lower
    place."""
    return top_stable(torch.linalg.vector_norm(features.float(), dim=-1), count)


@dataclass(repr=False)
class SinkFilter:
    """Mixin of methods that choose by attention: with `sink_ratio` they choose among the others,
    and keep as many tokens as without it.

    sink_ratio: share of the patches of a crop that is left out, those of the largest norm;
                SinkPruner proposes 0.01 (6 of 576), 0: none. Never so many that the budget cannot
                be filled
    """

    sink_ratio: float = field(default=0.0, kw_only=True)

    def __post_init__(self):
        super().__post_init__()  # type: ignore[misc] # of the method it is mixed into
        check_sink_ratio(self.sink_ratio)

    def sink_places(self, features: Tensor, least: int) -> Tensor | None:
        """(B, H) places of the sinks among features (B, N, C), at most as many as leave `least`
        tokens of each crop; None: there are none."""
        count = self.sink_count(features.shape[1], least)
        return sinks(features, count) if count else None

    def sink_count(self, size: int, least: int) -> int:
        """Sinks among the `size` tokens of a crop, of which `least` must be left."""
        return max(0, min(num_sinks(size, self.sink_ratio), size - least))

    def sink_mask(self, features: Tensor, least: int) -> Tensor | None:
        """(B, N) True at these places; None: there are none."""
        found = self.sink_places(features, least)
        if found is None:
            return None
        none = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
        return none.scatter(1, found, True)

    def candidates(self, vision: VisionTokens, least: int | None = None) -> VisionTokens:
        """The tokens to choose from; least: of each crop that must be left, None: the budget."""
        if least is None:
            least = self.num_keep(vision)  # type: ignore[attr-defined] # of a `SelectPruner`
        found = self.sink_places(vision.features, least)
        if found is None:
            return vision
        left = torch.ones_like(vision.positions, dtype=torch.bool).scatter(1, found, False)
        return vision.keep_mask(left, [left.shape[1] - found.shape[1]] * len(left))

    def with_norms(self, vision: VisionTokens) -> VisionTokens:
        """`vision` with the extra that `others` reads, where patches are left out at all."""
        if not self.sink_ratio:
            return vision
        norms = torch.linalg.vector_norm(vision.features.float(), dim=-1)
        return with_extra(vision, NORMS, norms)

    def others(self, vision: VisionTokens, rows: Tensor | slice, least: int) -> Tensor | None:
        """(G, M) places in the crops `rows` (G,) of all tokens but the sinks, of which at most so
        many are left out that `least` tokens are left; None: nothing is left out."""
        if NORMS not in vision.extras:
            return None
        norms = vision.extras[NORMS][rows]
        if not (count := self.sink_count(norms.shape[1], least)):
            return None
        left = torch.ones_like(norms, dtype=torch.bool)
        left.scatter_(1, top_stable(norms, count), False)
        return true_first(left)[:, : norms.shape[1] - count]

    def candidates_of_images(self, vision: VisionTokens, budget: int) -> VisionTokens:
        """Likewise where the crops of an image are chosen from as a whole: of each of them so many
        are left out that the tokens left of the image, unpadded, are `budget` or more."""
        size, counts = vision.features.shape[1], []
        most = num_sinks(size, self.sink_ratio)
        for number, crops in enumerate(vision.crops_of_images()):
            total = size * (own := crops.stop - crops.start)
            mosaic = None if vision.layouts is None else vision.layouts[number].mosaic
            if mosaic is not None:
                top, bottom, left, right = mosaic[1]
                total = size + (bottom - top) * (right - left)
            counts += [min(most, max(0, total - budget) // own)] * own
        if not any(counts):
            return vision
        found = sinks(vision.features, max(counts))
        rank = torch.arange(found.shape[1], device=found.device)
        stays = rank >= on_device(counts, found.device)[:, None]
        mask = torch.ones_like(vision.positions, dtype=torch.bool).scatter(1, found, stays)
        return vision.keep_mask(mask, [size - count for count in counts])

    def with_sinks_marked(self, vision: VisionTokens, least: int) -> VisionTokens:
        """`vision` with the extra `LEFT_OUT`, where there are sinks, for methods that choose behind
        the projector from whole grids; `without_marks` takes it away again."""
        marks = self.sink_mask(vision.features, least)
        return vision if marks is None else with_extra(vision, LEFT_OUT, marks)


def picked(
    others: Tensor | None, features: Tensor, scores: Tensor, choose: Callable[..., Tensor], *how
) -> Tensor:
    """Places (G, T) that `choose(features, scores, *how)` picks, given the tokens at the places
    `others` (G, M) alone (None: all); features (G, N, C), scores (G, N)."""
    if others is None:
        return choose(features, scores, *how)
    few = gather_tokens(features, others), scores.gather(1, others)
    return others.gather(1, choose(*few, *how))


def without_marks(vision: VisionTokens) -> tuple[VisionTokens, Tensor | None]:
    """(the tokens as they were before `with_sinks_marked`, (B, N) True on sinks or None)."""
    return without_extra(vision, LEFT_OUT), vision.extras.get(LEFT_OUT)
