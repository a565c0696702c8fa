"""Random: keep patches drawn at random, the baseline every method has to beat.

The draw depends on `seed` and on the pixels of the crop alone, so it is the same on every device,
in every batch and in every run.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import SelectPruner
from .ops import top_stable
from .tokens import VisionTokens


@dataclass
class Random(SelectPruner):
    """
    visual_token_num: tokens per image; on LLaVA-NeXT the sum over its crops
    seed:             another seed draws other patches
    """

    seed: int = 0

    name = "random"
    needs = frozenset({"fingerprint"})
    anyres_tiles = (2, 2)

    def select(self, vision: VisionTokens) -> Tensor:
        places = torch.arange(vision.features.shape[1], device=vision.features.device)
        draw = scramble(scramble(vision.cue("fingerprint")[:, None] + self.seed) + places)  # (B, N)
        return top_stable(draw, self.num_keep(vision))


def scramble(x: Tensor) -> Tensor:
    """Integer hash with well mixed bits (the finaliser of splitmix64 on int64, wrapping)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
