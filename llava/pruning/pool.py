"""Pool: average neighbouring patches, the control that every way of merging has to beat.

The patch grid is cut into as many cells of equal area as the budget has tokens, as square as the
number allows; a patch that lies in two cells counts in both by its share. No paper.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import SelectPruner
from .interfaces import LanguageModel
from .tokens import MERGED, VisionTokens, without_cues


@dataclass
class Pool(SelectPruner):
    """
    visual_token_num: tokens per image, any number; on LLaVA-NeXT the sum over its five crops
    """

    name = "pool"
    blends = True
    anyres_tiles = (2, 2)

    def attach(self, model: LanguageModel) -> None:
        tower = model.get_vision_tower()
        if tower is not None and tower.select_feature != "patch":
            raise ValueError(
                f"{self.name} averages a grid of patches, but mm_vision_select_feature is "
                f"{tower.select_feature!r}"
            )

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        share, centre = cells(vision.grid, self.num_keep(vision), vision.features.device)
        features = (share @ vision.features.float()).to(vision.features.dtype)
        batch = len(features)
        return replace(
            without_cues(vision),
            features=features,
            positions=centre.expand(batch, -1),
            extras={MERGED: (share.amax(dim=1) < 1).expand(batch, -1)},
        )


def cells(grid: tuple[int, int], count: int, device=None) -> tuple[Tensor, Tensor]:
    """(share of every patch in every cell (count, N), rows sum to 1; centre patch (count,)) of
    `count` cells in raster order that divide the grid (h, w) into about sqrt(count h / w) rows.

    Rows differ by one cell at most; where they do, so do the areas of their cells.
    """
    height, width = grid
    rows = min(max(round((count * height / width) ** 0.5), 1), height, count)
    cell = torch.arange(count, device=device)
    row = ((cell + 1) * rows - 1) // count  # spreads the cells evenly over the rows
    first = row * count // rows
    per_row = (row + 1) * count // rows - first
    column = cell - first
    down, middle_row = overlap(row, torch.full_like(row, rows), height)
    across, middle_column = overlap(column, per_row, width)
    share = (down[:, :, None] * across[:, None, :]).flatten(1)
    return share, middle_row * width + middle_column


def overlap(index: Tensor, parts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Part `index` of `parts` (n,) equal parts of a row of `size` places: (share of every place in
    it (n, size), summing to 1; place its middle lies on (n,))."""
    # In units of 1 / parts of a place everything is whole, so shares are exact.
    start, place = index * size, torch.arange(size, device=index.device) * parts[:, None]
    end = torch.minimum((start + size)[:, None], place + parts[:, None])
    inside = (end - torch.maximum(start[:, None], place)).clamp(min=0)
    return inside.float() / size, (2 * start + size) // (2 * parts)
