"""DivPrune: the most diverse subset; every pick is the token farthest from those picked before.

Paper: DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models,
https://arxiv.org/abs/2503.02175

Differs from the release: options instead of environment variables; the budget may be a count, not
only a ratio; every image is pruned by itself at its true place (there, the first image decides for
the whole batch and must start at the place of one fixed system prompt); distances are fp32, a token
is never picked twice and ties go to the lower place (there, half precision ties, and duplicates may
be sent twice); one running minimum instead of a matrix that is gathered anew for every pick.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import WholeImages
from .captured import captured
from .ops import cosines
from .published import Published
from .tokens import ImageTokens, VisionTokens, keep_chosen


@dataclass
class DivPrune(WholeImages):
    """
    visual_token_num: tokens per image; on LLaVA-NeXT of the whole sequence of an image, in which
                      newline tokens are candidates like any other
    subset_ratio:     share of the image's tokens instead of their number (the paper's 0.098 is 56
                      of 576), rounded half to even; None: `visual_token_num` counts
    """

    visual_token_num: int = 64
    subset_ratio: float | None = None

    name = "divprune"
    published = Published(environment={"SUBSET_RATIO": "subset_ratio"})

    def __post_init__(self):
        super().__post_init__()
        if self.subset_ratio is not None and not 0 < self.subset_ratio <= 1:
            raise ValueError(f"subset_ratio ({self.subset_ratio}) must lie above 0 and up to 1")

    def num_tokens(self, available: int) -> int:
        if self.subset_ratio is None:
            return super().num_tokens(available)
        return max(round(self.subset_ratio * available), 1)

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        if self.subset_ratio is None:
            super().check(num_patches, num_layers, crops)

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        return vision  # distances are measured in the space of the language model

    def after_projector(self, vision: VisionTokens) -> VisionTokens:
        """Images of a single crop, all at once."""
        if vision.crops_in_budget > 1:
            return vision
        picks = farthest_first(vision.features, self.num_tokens(vision.features.shape[1]))
        return vision.keep(picks.sort(dim=1).values)

    def after_layout(self, image: ImageTokens) -> ImageTokens:
        (pruned,) = self.after_layouts([image])
        return pruned

    def after_layouts(self, images: list[ImageTokens]) -> list[ImageTokens]:
        """Images of several crops, of which each has its own number of tokens."""

        def choose(alike: list[ImageTokens], count: int) -> Tensor:
            embeds = torch.stack([image.embeds for image in alike])
            return farthest_first(embeds, count).sort(dim=1).values

        return keep_chosen(images, [self.num_tokens(image.length) for image in images], choose)


@captured
def farthest_first(features: Tensor, count: int) -> Tensor:
    """Places (B, count) of features (B, N, C) in the order they are picked.

    The first is the token with the most distant nearest neighbour, each further one the token whose
    cosine distance to the picked ones is largest. Ties go to the lower place; copies of picks are
    all at distance 0.
    """
    count = min(count, features.shape[1])
    distance = 1 - cosines(features)  # (B, N, N)
    itself = torch.eye(features.shape[1], dtype=torch.bool, device=features.device)
    isolation = distance.masked_fill(itself, torch.inf).amin(dim=2)
    picks, reach = [], distance.new_full(isolation.shape, torch.inf)
    for number in range(count):
        pick = (reach if number else isolation).argmax(dim=1, keepdim=True)
        row = distance.gather(1, pick[..., None].expand(-1, -1, distance.shape[2]))[:, 0]
        reach = torch.minimum(reach, row).scatter(1, pick, -torch.inf)
        picks.append(pick)
    return torch.cat(picks, dim=1) if picks else isolation[:, :0].long()
