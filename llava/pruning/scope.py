"""SCOPE: patches that cover many others, the more attention they get the sooner.

Paper: SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs,
https://arxiv.org/abs/2510.24214

Similarities are those of the tower's features, as in the release (the paper leaves the layer open,
and another port takes projected ones); where blocks of patches become tokens, those of the tokens,
with the attention that they receive.

Differs from the release: options instead of environment variables; similarities and gains are fp32
with ties to the lower patch (there, half precision ties); one row of one layer is computed (there,
the maps of all layers); an image has a budget of its own (there, the images of a call share one); a
budget of all patches keeps each of them once (there, the first one several times).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import EqualShares
from .captured import captured
from .coverage import cover_most
from .extras import without_extra
from .ops import cosines
from .published import Published
from .sinks import NORMS, SinkFilter, picked
from .tokens import VisionTokens

COMBINATIONS = ("multiply", "add")


@dataclass
class Scope(SinkFilter, EqualShares):
    """
    visual_token_num: tokens per image; on LLaVA-NeXT shared out equally among its crops, rounded
                      down (640 of five crops are 128 each)
    alpha:            exponent of the attention; 0 is coverage alone
    combine:          "multiply": the gain in coverage times the attention; "add": plus
    sink_ratio:       share of the patches left out, those of the largest norm; 0: none
    """

    alpha: float = 1.0
    combine: str = "multiply"

    name = "scope"
    published = Published(environment={"ALPHA": "alpha"})
    needs = frozenset({"salience"})

    def __post_init__(self):
        super().__post_init__()
        if self.alpha < 0:
            raise ValueError(f"alpha ({self.alpha}) must be at least 0")
        if self.combine not in COMBINATIONS:
            raise ValueError(f"combine ({self.combine!r}) must be one of {', '.join(COMBINATIONS)}")

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        vision = self.with_norms(vision)
        return vision if vision.block > 1 else self.keep_shares(vision)

    def after_projector(self, vision: VisionTokens) -> VisionTokens:
        """Where blocks of patches become tokens here, those are chosen."""
        vision = vision if vision.block == 1 else self.keep_shares(vision)
        return without_extra(vision, NORMS)

    def pick(self, vision: VisionTokens, rows: Tensor | slice, count: int) -> Tensor:
        attention = vision.cue("salience")[rows] * vision.num_heads  # the sum over heads
        given = vision.features[rows], attention**self.alpha
        others = self.others(vision, rows, count)
        return picked(others, *given, cover_salient, count, self.combine == "add")


@captured
@torch.no_grad()
def cover_salient(features: Tensor, weight: Tensor, count: int, add: bool) -> Tensor:
    """Places (B, T) of features (B, N, C) in the order they are picked: the most of the gain in
    coverage times `weight` (B, N), or plus it."""
    cover = cosines(features)
    return cover_most(cover, count, None if add else weight, weight if add else None)
