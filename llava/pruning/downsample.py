"""Downsample: a smaller image into the vision tower, the control that saves work there as well.

Every crop is resized so that its patches make up the budget; position embeddings are interpolated
to the smaller grid. No paper.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from .base import SelectPruner
from .tokens import VisionTokens


@dataclass
class Downsample(SelectPruner):
    """
    visual_token_num: tokens per image, of which the largest square is used (128 gives 11 x 11);
                      on LLaVA-NeXT the sum over its five crops (640 gives 5 x 121)
    """

    name = "downsample"
    anyres_tiles = (2, 2)

    def side(self, crops: int) -> int:
        """Patches per side of a crop."""
        return math.isqrt(self.tokens_per_crop(crops))

    def before_tower(self, images: Tensor, patch_size: int, crops: int = 1) -> Tensor:
        size = self.side(crops) * patch_size
        if size >= images.shape[-1]:
            return images
        small = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
        return small.to(images.dtype)

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        return vision

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        return [min(self.side(crops) ** 2, num_patches) * crops] * num_layers
