"""VisPruner: the patches with the most attention, and of the others those least like each other.

The attention is that of the class token or, in a tower without one, what patches receive from all.

Paper: Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in
Vision-Language Models, https://arxiv.org/abs/2412.01818

Differs from the release: any budget and ratio works (there, a residue of odd size ends in an
IndexError); arithmetic is fp32 with stable sorts (there, ties of half precision fall as the device
likes); similarities are computed once instead of once per round; images of a batch stay separate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import SelectPruner
from .captured import captured
from .ops import normalize, top_stable
from .option_types import check_share
from .published import Published
from .sinks import SinkFilter
from .tokens import VisionTokens


@dataclass
class VisPruner(SinkFilter, SelectPruner):
    """
    visual_token_num: tokens per image; on LLaVA-NeXT the sum over its five crops (640 = 5 x 128)
    important_ratio:  share of the kept patches chosen by class-token attention, 0 to 1; the rest is
                      chosen for diversity. 1 is attention alone
    drop_per_round:   near-duplicates removed in each matching round; larger is faster and coarser
    sink_ratio:       share of the patches left out, those of the largest norm; 0: none
    """

    visual_token_num: int = 64
    important_ratio: float = 0.5
    drop_per_round: int = 8

    name = "vispruner"
    published = Published(positional=("visual_token_num", "important_ratio"))
    needs = frozenset({"salience"})
    anyres_tiles = (2, 2)

    def __post_init__(self):
        super().__post_init__()
        check_share("important_ratio", self.important_ratio)
        if self.drop_per_round < 1:
            raise ValueError(f"drop_per_round ({self.drop_per_round}) must be at least 1 patch")

    def select(self, vision: VisionTokens) -> Tensor:
        num_keep = self.num_keep(vision)
        num_important = int(num_keep * self.important_ratio)
        salience = vision.cue("salience")
        order = top_stable(salience, salience.shape[1])  # (B, N)
        important, rest = order[:, :num_important], order[:, num_important:]
        num_diverse = num_keep - num_important
        diverse = drop_duplicates(vision.features, rest, num_diverse, self.drop_per_round)
        return torch.cat([important, diverse], dim=1)


@captured
def drop_duplicates(features: Tensor, index: Tensor, num_keep: int, per_round: int) -> Tensor:
    """Shrinks `index` (B, R), places of features (B, N, C), to (B, num_keep), the most redundant
    patches first, no more than `per_round` at a time.

    Each round compares the patches at even ranks with those at odd ranks. An even one is redundant
    when some odd one points the same way; odd ones always survive the round. The survivors' new
    order decides the next pairing.
    """
    if num_keep == 0 or index.shape[1] == num_keep:
        return index[:, :num_keep]
    unit = normalize(features)
    similarity = unit @ unit.transpose(1, 2)  # (B, N, N)
    row = torch.arange(len(unit), device=unit.device)[:, None, None]
    while (excess := index.shape[1] - num_keep) > 0:  # five small operations
        even, odd = index[:, ::2], index[:, 1::2]
        num_drop = min(per_round, excess, even.shape[1])
        if odd.shape[1] == 0:  # a single patch has nothing to resemble
            return index[:, :num_keep]
        redundancy = similarity[row, even[:, :, None], odd[:, None]].amax(dim=2)
        survivors = top_stable(redundancy, even.shape[1])[:, num_drop:]
        index = torch.cat([even.gather(1, survivors), odd], dim=1)
    return index
