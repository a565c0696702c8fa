"""Downsample: a smaller image into the vision tower, the control that saves work there as well.

Every crop is resized so that its patches make up the budget; position embeddings are interpolated
to the smaller grid. An image with a grid of its own keeps its proportions, as with a bound on its
pixels. No paper.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .base import SelectPruner
from .interfaces import LanguageModel
from .own_grids import OwnGrids
from .tokens import VisionTokens


@dataclass
class Downsample(OwnGrids, SelectPruner):
    """
    visual_token_num: tokens per image, of which the largest square is used (128 gives 11 x 11);
                      on LLaVA-NeXT the sum over its five crops (640 gives 5 x 121)
    """

    name = "downsample"
    makes_images_smaller = True
    anyres_tiles = (2, 2)

    def attach(self, model: LanguageModel) -> None:
        super().attach(model)
        tower = model.get_vision_tower()
        if tower is not None and not tower.takes_smaller_images:
            raise ValueError(
                f"{self.name} shows the vision tower smaller images, which {tower.title} does not "
                "take: choose another method, or a model with another tower"
            )

    def sides(self, grid: tuple[int, int], crops: int) -> tuple[int, int]:
        """(h, w) of the largest grid of about the proportions of `grid` within the budget of a
        crop."""
        budget, (height, width) = self.tokens_per_crop(crops), grid
        rows = min(max(1, math.isqrt(budget * height // width)), budget)
        return rows, max(1, min(budget // rows, math.isqrt(budget * width // height)))

    def before_tower(self, images: Tensor, patch_size: int, crops: int = 1) -> Tensor:
        height, width = images.shape[2:]
        grid = height // patch_size, width // patch_size
        if self.tokens_per_crop(crops) >= math.prod(grid):
            return images
        size = tuple(side * patch_size for side in self.sides(grid, crops))
        small = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
        return small.to(images.dtype)

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        return vision

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        own, side = self.with_budget_of(num_patches * crops), math.isqrt(num_patches)
        if (budget := own.tokens_per_crop(crops)) < num_patches:
            # Grids that are no squares may fill the budget.
            num_patches = budget if self.own_grids else math.prod(own.sides((side, side), crops))
        return [num_patches * crops] * num_layers
