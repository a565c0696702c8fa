"""V2Drop: drop the visual tokens that the last layer changed least.

Paper: Variation-aware Vision Token Dropping for Faster Large Vision-Language Models (V2Drop),
https://arxiv.org/abs/2509.01552

Differs from the release: layers and shares are options (there, constants for one model and one
budget), and follow the depth of the decoder; every image of every prompt of a batch is cut on its
own, at its real place (there, the first prompt decides for all); nothing is kept on the model
between calls; any attention backend. Schedules for budgets other than 192 of 576 are not published:
ours scale the published shares.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import ShareOption, check_budget
from .prefill import Prefill
from .staged import CutLayers, StagedPlan

LAYERS = (3, 17, 22)
#: share of what is left that each cut keeps, published for a budget of 192 of 576
SHARES = (0.5, 0.5, 0.0)


@dataclass
class Plan(StagedPlan):
    """
    before: (B, S, D) states that entered the layer before the next cut
    """

    before: Tensor | None = None


@dataclass
class V2Drop(ShareOption, CutLayers):
    """
    visual_token_num: tokens per image. A third of them is the published setting (192 of 576: 576,
                      288, 144 and 1, which is 203 on average over 32 layers); any other number is
                      the average over the layers: the shares of the published setting are
                      multiplied by the same factor, or moved the same part of the way to 1
    layer_list:       decoder layers that see fewer tokens than the one before; None: 3, 17, 22 of
                      32 layers, scaled to the depth
    keep_list:        what each cut leaves: whole numbers are tokens of an image, fractions shares
                      of what is left of it, at least one token; replaces `visual_token_num`. None:
                      what the budget says
    """

    visual_token_num: int = 192
    layer_list: Sequence[int] | None = None
    keep_list: Sequence[float] | None = None

    name = "v2drop"
    reads_text = False
    renumbers = False
    looks_back = 1
    paper_layers = LAYERS
    plan_class = Plan

    def __post_init__(self):
        self.check_budgets()
        layers, keep = self.layer_list or LAYERS, self.keep_list or SHARES
        if len(layers) != len(keep):
            raise ValueError(
                f"layer_list ({self.layer_list}) and keep_list ({self.keep_list}) must have one "
                "entry per cut each"
            )
        if min(layers) < 1 or list(layers) != sorted(set(layers)):
            raise ValueError(f"layer_list ({layers}) must name layers from 1 on, ascending")
        if any(number < 0 or number > 1 and int(number) != number for number in keep):
            raise ValueError(
                f"keep_list ({keep}) must hold whole numbers of tokens, or shares from 0 to 1"
            )

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        super().check(num_patches, num_layers, crops)
        if self.keep_list is not None:  # the budget is not used
            return
        total, layers = num_patches * crops, self.cut_layers(num_layers)
        budget = self.tokens_of(total)
        check_budget(budget, num_patches, crops, shared=False)
        least = total * layers[0] + num_layers - layers[0]
        if least > budget * num_layers and not published(budget, total):
            raise ValueError(
                f"visual_token_num ({budget}) is out of reach: all {total} tokens enter the first "
                f"{layers[0]} of {num_layers} layers, and one the others, which is "
                f"{least / num_layers:.1f} on average; choose at least that many, or an earlier "
                "layer_list"
            )

    # --- how many -----------------------------------------------------------------------------

    def image_schedule(
        self, count: int, num_layers: int, num_patches: int, budget: int = 0
    ) -> list[int]:
        layers = self.cut_layers(num_layers)
        if self.keep_list is not None:
            return schedule(count, layers, self.keep_list, num_layers)
        average = self.visual_token_num
        if average >= count:
            return [count] * num_layers
        if published(average, count):
            return schedule(count, layers, shares(len(layers), 1.0), num_layers)
        low, high, best = 0.0, 2.0, schedule(count, layers, [0.0] * len(layers), num_layers)
        for _ in range(50):  # the largest factor whose average stays within the budget
            factor = (low + high) / 2
            plan = schedule(count, layers, shares(len(layers), factor), num_layers)
            if sum(plan) <= average * num_layers:
                low, best = factor, plan
            else:
                high = factor
        return best

    # --- which --------------------------------------------------------------------------------

    def before_layer(self, index: int, prefill: Prefill) -> Prefill:
        prefill = super().before_layer(index, prefill)
        plan: Plan = prefill.state
        plan.before = prefill.hidden_states if index + 1 in plan.cuts else None
        return prefill

    def score(self, prefill: Prefill, kept: list[list[int]]) -> Tensor:
        return variation(prefill.state.before, prefill.hidden_states)


def variation(before: Tensor, after: Tensor) -> Tensor:
    """(B, S) fp32 length of what was added to each token, from states (B, S, D)."""
    return torch.linalg.vector_norm(after.float() - before.float(), dim=-1)


def published(budget: int, total: int) -> bool:
    """Whether the published setting is for this budget of an image of `total` tokens: a third."""
    return budget == max(1, round(total / 3))


def shares(cuts: int, factor: float) -> list[float]:
    """Shares that `cuts` cuts keep: the published ones, or equal ones for another number of cuts,
    times a factor up to 1; from 1 to 2 they approach 1."""
    known = SHARES if cuts == len(SHARES) else [0.5] * cuts
    return [s * factor if factor <= 1 else s + (1 - s) * (factor - 1) for s in known]


def schedule(count: int, layers, keep: Sequence[float], num_layers: int) -> list[int]:
    """Tokens entering each layer when `keep`, see `V2Drop.keep_list`, is left from `layers` on."""
    plan = [count] * num_layers
    for layer, number in zip(layers, keep, strict=True):
        left = plan[layer]
        wanted = int(number if isinstance(number, int) or number > 1 else left * number)
        plan[layer:] = [min(left, max(1, wanted))] * (num_layers - layer)
    return plan
