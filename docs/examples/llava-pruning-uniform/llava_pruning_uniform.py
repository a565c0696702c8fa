"""Uniform: keep evenly spaced patches, whatever the image shows; a baseline without a score."""

from dataclasses import dataclass

import torch

from llava.pruning import SelectPruner


@dataclass
class Uniform(SelectPruner):
    """
    visual_token_num: tokens per image; on LLaVA-NeXT the sum over its crops
    phase:            place of a kept patch in its share of the grid, 0: the first, below 1
    """

    phase: float = 0.5

    name = "uniform"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.phase < 1:
            raise ValueError(f"phase ({self.phase!r}) must be at least 0 and below 1")

    def select(self, vision):
        num_crops, num_patches = vision.features.shape[:2]
        count = self.num_keep(vision)
        steps = torch.arange(count, device=vision.features.device) + self.phase
        index = (steps * num_patches / count).long().clamp(max=num_patches - 1)  # (T,)
        return index.expand(num_crops, -1)
