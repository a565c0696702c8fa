"""Pruning to tokens that were chosen beforehand: those in boxes, or those of a trained glimpse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.model.prompt import Prompt
from llava.pruning.base import Pruner
from llava.pruning.prefill import Prefill
from llava.pruning.stages import DecoderStage

#: the extra of a prompt, (B, S) True on the visual tokens that stay
NEEDED = "needed"


class KeepNeeded(DecoderStage, Pruner):
    """Drops, behind decoder layer `layer`, the visual tokens that are not marked as needed, from
    hidden states and from the caches of the layers before. Positions stay."""

    name = "needed"

    def __init__(self, layer: int):
        self.layer = layer

    def before_layer(self, index: int, prefill: Prefill) -> Prefill:
        return self.reduce(prefill) if index == self.layer + 1 else prefill

    def after_layers(self, prefill: Prefill) -> Prefill:
        return self.reduce(prefill) if self.layer == len(prefill.decoder.layers) - 1 else prefill

    def pruned_caches(self, index: int, num_layers: int) -> range:
        return range(index) if index == self.layer + 1 else range(0)

    def reusable_layers(self, prefill: Prefill) -> int:
        last = len(prefill.decoder.layers) - 1  # a cut behind it is made on the whole prompt
        return min(self.layer + 1, last)

    def reduce(self, prefill: Prefill) -> Prefill:
        return prefill.keep(~prefill.is_visual | prefill.extras[NEEDED])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layer={self.layer})"


def in_masks(prompt: Prompt, masks: Sequence[Tensor]) -> Tensor:
    """(B, S) True on the visual tokens whose cell is True in the mask (h, w) of their prompt; the
    first token of an image of which nothing is needed stays.

    Raises ValueError where a prompt does not hold one image of that grid.
    """
    rows = [mask.flatten() for mask in masks]
    for row, count in zip(rows, prompt.counts.visual, strict=True):
        if len(row) != count:
            raise ValueError(
                f"a prompt holds {count} visual tokens, but its mask has {len(row)} cells: give "
                "one image of one crop"
            )
    cells = torch.nn.utils.rnn.pad_sequence(rows, True).to(prompt.patch_index.device)
    cells[~cells.any(dim=1), 0] = True
    places = prompt.patch_index
    return cells.gather(1, places.clamp(min=0)) & (places >= 0)


@torch.no_grad()
def by_method(llava, prompt: Prompt, pruner: Pruner) -> Tensor:
    """(B, S) True on the visual tokens that a method leaves to the last decoder layer; `prompt` was
    built with it in use."""
    out = llava.model(
        prompt.inputs_embeds,
        prompt.attention_mask,
        prompt.position_ids,
        visuals=prompt.visuals,
        stage=pruner.decoder,
    )
    visual = prompt.visual_index >= 0
    if out.index is None:
        return visual
    there = out.index >= 0 if out.valid is None else (out.index >= 0) & out.valid
    kept = torch.zeros_like(visual, dtype=torch.long)
    kept.scatter_reduce_(1, out.index.clamp(min=0), there.long(), "amax")
    return visual & kept.bool()
