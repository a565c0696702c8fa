"""HiPrune: patches a middle tower layer attends to, their neighbours, and those of a deep layer.

Paper: HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language
Models, https://arxiv.org/abs/2508.00553

Differs from the release: the column means of two attention maps are computed, one head at a time
(there, all maps of all layers are kept); images of a call keep a budget each (there, they share
one); with a large `alpha` the neighbours that do not fit are left out (there, an error); fp32 and
stable ties; any device.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import EqualShares
from .ops import scale_layer, top_stable
from .option_types import check_share
from .published import Published
from .sinks import SinkFilter
from .tokens import VisionTokens


@dataclass
class HiPrune(SinkFilter, EqualShares):
    """
    visual_token_num: tokens per image; on LLaVA-NeXT shared out equally among its crops, rounded
                      down (160 over three crops are 53 each)
    alpha:            share of the budget, 0 to 1, that anchors and their neighbours may take at
                      most; larger favours the middle layer
    object_layer:     tower layer of the anchors, counted from 1 as in the paper; None: 9 of 24
                      layers, scaled to the depth of the tower
    wrap:             as released, the neighbour beyond the border of the grid is the first or last
                      patch of the next row, and beyond the first or last row the corner patch;
                      False: there is none
    sink_ratio:       share of the patches left out, those of the largest norm; 0: none
    """

    alpha: float = 0.1
    object_layer: int | None = None
    wrap: bool = True

    name = "hiprune"
    published = Published(
        environment={
            "HIPRUNE_RETENTION": "visual_token_num",
            "HIPRUNE_ALPHA": "alpha",
            "HIPRUNE_OBJECT_LAYER": "object_layer",
        }
    )

    def __post_init__(self):
        super().__post_init__()
        check_share("alpha", self.alpha)
        if self.object_layer is not None and self.object_layer < 1:
            raise ValueError(f"object_layer ({self.object_layer}) counts from 1")

    def tower_extras(self, num_layers: int, selected: int) -> dict[int, frozenset[str]]:
        middle = self.object_layer
        middle = scale_layer(9, num_layers, reference=24) if middle is None else middle
        if middle - 1 > selected:
            raise ValueError(
                f"object_layer ({middle}) must be at most {selected + 1}, the layer of the features"
            )
        return {layer: frozenset({"attention_mean"}) for layer in (middle - 1, selected)}

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        return replace(self.keep_shares(vision), layers={})

    def pick(self, vision: VisionTokens, rows: Tensor | slice, count: int) -> Tensor:
        means = [
            vision.layers[number]["attention_mean"]
            for number in sorted(vision.layers)
            if "attention_mean" in vision.layers[number]
        ]
        sinks = self.sink_places(vision.features[rows], count)
        return self.choose(means[0][rows], means[-1][rows], count, vision.grid, sinks)

    def choose(
        self,
        middle: Tensor,
        deep: Tensor,
        budget: int,
        grid: tuple[int, int],
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Places (G, budget) from the attention (G, N) every patch receives in the two layers;
        sinks: places (G, H) that are left out."""
        if sinks is not None:
            middle = middle.scatter(1, sinks, -torch.inf)
            deep = deep.scatter(1, sinks, -torch.inf)
        anchors = top_stable(middle, round(budget * self.alpha / 5))
        shallow = self.with_neighbours(anchors, grid)
        # Attention is at most 1: anchors come first, then neighbours, then the deep layer's choice.
        score = deep + torch.zeros_like(deep).scatter_(1, shallow, 1.0)
        return top_stable(score.scatter_add(1, anchors, torch.ones_like(deep)), budget)

    def with_neighbours(self, anchors: Tensor, grid: tuple[int, int]) -> Tensor:
        """(G, 5n) anchors (G, n) with their left, right, upper and lower neighbours, clamped to the
        grid; a neighbour that does not exist is the anchor itself."""
        rows, columns = grid
        moved = [anchors + step for step in (0, -1, 1, -columns, columns)]
        if self.wrap:
            return torch.cat(moved, dim=1).clamp(0, rows * columns - 1)
        row, column = anchors // columns, anchors % columns
        exists = [row >= 0, column > 0, column < columns - 1, row > 0, row < rows - 1]
        pairs = zip(exists, moved, strict=True)
        return torch.cat([torch.where(ok, place, anchors) for ok, place in pairs], dim=1)
