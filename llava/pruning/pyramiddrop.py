"""PyramidDrop: cut the visual tokens in stages, deeper layers see ever fewer of them.

Paper: PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy
Reduction, https://arxiv.org/abs/2410.17247

Differs from the release: one row of the attention map is computed per stage instead of the map;
every image of a prompt is cut on its own (there, the first one only); any padding and any backend
works; the published layers, given for 32, follow the depth of the decoder unless they are given
(the release uses 8, 16, 24 for 40 layers, too). Query is always the last prompt token; the several
query rows of conversations in training are not used. `visual_token_num` is our addition.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .base import ShareOption, check_budget
from .ops import scale_layers
from .staged import StagedPruner

#: layers of the cuts in a 32-layer decoder, the published ones first, earlier ones for less
LAYERS = ((8, 16, 24), (4, 12, 20), (2, 8, 16), (1, 4, 8), (0, 4, 8))
RATIOS = (0.5, 0.25, 0.125)
#: largest share of the budget that the layers before the first cut may take
HEAD_SHARE = 0.6


@dataclass
class PyramidDrop(ShareOption, StagedPruner):
    """
    visual_token_num:       tokens per image, averaged over the decoder layers: the shares are
                            x, x^2, x^3, ... with the x that gives this average. None: the shares
                            below
    layer_list:             decoder layers that see fewer tokens than the one before. None: 8, 16,
                            24 of 32 layers, scaled to the depth; earlier ones where a budget asks
    image_token_ratio_list: share of all tokens of the image left after each cut. None: 0.5, 0.25,
                            0.125 (average 270 of 576), or what follows from the budget
    """

    visual_token_num: int | None = None
    layer_list: Sequence[int] | None = None
    image_token_ratio_list: Sequence[float] | None = None

    name = "pyramiddrop"

    def __post_init__(self):
        self.check_budgets()
        layers, ratios = self.layer_list, self.image_token_ratio_list
        if self.has_budget and ratios is not None:
            number, share = self.visual_token_num, self.visual_token_ratio
            given = (
                f"visual_token_num ({number})" if share is None else f"visual_token_ratio ({share})"
            )
            raise ValueError(
                f"{given} and image_token_ratio_list ({ratios}) both say how many tokens to keep: "
                "give one of them"
            )
        if not self.has_budget and len(layers or LAYERS[0]) != len(ratios or RATIOS):
            raise ValueError(
                f"layer_list ({layers}) and image_token_ratio_list ({ratios}) must have one entry "
                "per cut each"
            )
        if ratios is not None and not (min(ratios, default=1) > 0 and _falling([1, *ratios])):
            raise ValueError(
                f"image_token_ratio_list ({ratios}) must not rise, from at most 1 to above 0"
            )
        if layers is not None and (not layers or min(layers) < 0 or not _rising(layers)):
            raise ValueError(f"layer_list ({layers}) must name layers from 0 on, ascending")

    def check_depth(self, num_layers: int) -> None:
        layers = self.layer_list or scale_layers(LAYERS[-1], num_layers)
        if layers[-1] >= num_layers:
            raise ValueError(f"layer_list {layers} must stay below the {num_layers} decoder layers")

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        super().check(num_patches, num_layers, crops)
        total = num_patches * crops
        if self.visual_token_ratio is not None:
            return self.with_budget_of(total).check(num_patches, num_layers, crops)
        layers = self.cut_layers(total, num_layers)
        if layers[-1] >= num_layers:
            raise ValueError(f"layer_list {layers} must stay below the {num_layers} decoder layers")
        if not self.has_budget:
            return
        budget = self.tokens_of(total)
        check_budget(budget, num_patches, crops, shared=False)
        least = total * layers[0] + num_layers - layers[0]
        if least > budget * num_layers:
            raise ValueError(
                f"visual_token_num ({budget}) cannot be met with a first cut at layer {layers[0]}: "
                f"{total} tokens before it are {least / num_layers:.1f} on average"
            )

    def cut_layers(self, count: int, num_layers: int) -> tuple[int, ...]:
        """Layers of the cuts for an image of `count` tokens."""
        if self.layer_list is not None:
            return tuple(self.layer_list)
        choices = [scale_layers(layers, num_layers) for layers in LAYERS]
        if self.visual_token_num is None:
            return choices[0]
        allowed = HEAD_SHARE * self.visual_token_num * num_layers
        return next((c for c in choices if c[0] * count <= allowed), choices[-1])

    def image_schedule(
        self, count: int, num_layers: int, num_patches: int, budget: int = 0
    ) -> list[int]:
        layers, average = self.cut_layers(count, num_layers), self.visual_token_num
        if average is None:
            return schedule(count, layers, self.image_token_ratio_list or RATIOS, num_layers)
        if average >= count:
            return [count] * num_layers
        low, high, best = 0.0, 1.0, None
        for _ in range(50):  # the largest x whose average stays within the budget
            x = (low + high) / 2
            powers = [x ** (stage + 1) for stage in range(len(layers))]
            plan = schedule(count, layers, powers, num_layers)
            if sum(plan) <= average * num_layers:
                low, best = x, plan
            else:
                high = x
        return best or schedule(count, layers, [0.0] * len(layers), num_layers)


def schedule(count: int, layers, ratios, num_layers: int) -> list[int]:
    """Tokens entering each layer when `ratios` of `count` are left from `layers` on; an image
    keeps at least one."""
    plan = [count] * num_layers
    for layer, ratio in zip(layers, ratios, strict=True):
        plan[layer:] = [min(count, max(1, int(count * ratio)))] * (num_layers - layer)
    return plan


def _falling(values) -> bool:
    return all(a >= b for a, b in zip(values, values[1:], strict=False))


def _rising(values) -> bool:
    return all(a < b for a, b in zip(values, values[1:], strict=False))
