"""Methods that act in several decoder layers: what they have in common.

Shapes use the letters of `llava.pruning.tokens`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Pruner
from .extras import with_number
from .ops import scale_layers
from .prefill import Prefill
from .stages import DecoderStage
from .tokens import ImageTokens

#: the number of an image that says how many of its tokens a `StagedPruner` may keep
BUDGET = "budget"
#: the number of an image that says how many patches its crops have
PATCHES = "patches"


@dataclass
class StagedPlan:
    """
    cuts: layers with fewer tokens than the one before
    kept: per row and image, the tokens that enter each layer
    """

    cuts: set[int]
    kept: list[list[list[int]]]


@dataclass
class StagedPruner(DecoderStage, Pruner):
    """Drops visual tokens before several decoder layers, those first that the last prompt token
    attends to least in the layer about to run; positions are counted anew after every cut.

    A method overrides `image_schedule` and, if it has a score of its own, `score`.
    """

    reads_text = True
    #: whether positions are counted anew after every cut
    renumbers: ClassVar[bool] = True
    #: layers before a cut of which the score uses something
    looks_back: ClassVar[int] = 0
    #: what is noted for a batch; a method that notes more has a dataclass of its own
    plan_class: ClassVar[type[StagedPlan]] = StagedPlan

    def image_schedule(
        self, count: int, num_layers: int, num_patches: int, budget: int = 0
    ) -> list[int]:
        """Tokens of an image of `count` tokens that enter each layer; never more than before.

        num_patches: patches of one crop; budget: what the method left for the image in
        `image_extras[BUDGET]`, 0 where it left nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} must define image_schedule()")

    def score(self, prefill: Prefill, kept: list[list[int]]) -> Tensor:
        """(B, S) importance of every token before a cut that leaves `kept` tokens of every image of
        every row; values on text are ignored."""
        return prefill.next_attention()

    def before_prompt(self, image: ImageTokens) -> ImageTokens:
        """Leaves how many patches a crop of the image has."""
        patches = math.prod(image.crop_grid)
        return with_number(image, PATCHES, patches)

    def before_layer(self, index: int, prefill: Prefill) -> Prefill:
        if index == 0:
            prefill.state = self._plan(prefill)
        plan: StagedPlan = prefill.state
        if index not in plan.cuts:
            return prefill
        kept = [[image[index] for image in row] for row in plan.kept]
        return prefill.keep_visual(self.score(prefill, kept), kept, renumber=self.renumbers)

    def reusable_layers(self, prefill: Prefill) -> int:
        first = min(self._plan(prefill).cuts, default=None)
        return len(prefill.decoder.layers) if first is None else first - self.looks_back

    def _plan(self, prefill: Prefill) -> StagedPlan:
        num_layers, counts = len(prefill.decoder.layers), prefill.counts.images
        nothing = [[0] * len(row) for row in counts]
        budgets, patches = (
            prefill.image_numbers(name) if name in prefill.image_extras else nothing
            for name in (BUDGET, PATCHES)
        )
        plan: list[list[list[int]]] = []
        cuts: set[int] = set()
        for images in map(zip, counts, patches, budgets):
            plan.append(schedules := [])
            for count, num_patches, budget in images:
                own = self.with_budget_of(count)
                schedules.append(own.image_schedule(count, num_layers, num_patches, budget))
                before = [count, *schedules[-1][:-1]]
                cuts |= {n for n in range(num_layers) if schedules[-1][n] < before[n]}
        return self.plan_class(cuts, plan)

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        own = self.with_budget_of(num_patches * crops)
        return own.image_schedule(num_patches * crops, num_layers, num_patches)


class CutLayers(StagedPruner):
    """Base of those whose option `layer_list` names the decoder layers that see fewer tokens than
    the one before."""

    layer_list: Sequence[int] | None
    #: these layers of a 32-layer decoder when none are given
    paper_layers: ClassVar[tuple[int, ...]]

    def cut_layers(self, num_layers: int) -> tuple[int, ...]:
        """`layer_list` in a decoder with `num_layers` layers."""
        return tuple(self.layer_list or scale_layers(self.paper_layers, num_layers))

    def check_depth(self, num_layers: int) -> None:
        layers = self.cut_layers(num_layers)
        if not ascend(layers, num_layers):
            raise ValueError(f"layer_list {layers} must ascend below the {num_layers} layers")


class StageLayers(DecoderStage, Pruner):
    """Base of methods whose option `pruning_layers` names the decoder layers of which the attention
    rates; the layer after each sees fewer tokens."""

    pruning_layers: Sequence[int] | None

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """`pruning_layers` in a decoder with `num_layers` layers."""
        raise NotImplementedError(f"{type(self).__name__} must define stage_layers()")

    def check_depth(self, num_layers: int) -> None:
        layers = self.stage_layers(num_layers)
        if not ascend(layers, num_layers - 1):
            raise ValueError(
                f"pruning_layers {layers} must ascend and leave a layer of {num_layers} after them"
            )

    def reusable_layers(self, prefill: Prefill) -> int:
        return self.stage_layers(len(prefill.decoder.layers))[0]


def ascend(layers: Sequence[int], end: int) -> bool:
    """Whether layers ascend, from 0 on and below `end`."""
    return list(layers) == sorted(set(layers)) and 0 <= layers[0] and layers[-1] < end
