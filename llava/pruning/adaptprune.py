"""AdaptPrune: attended patches one by one, each pick damping the similar patches around it.

Paper: Multi-Cue Adaptive Visual Token Pruning for Large Vision-Language Models,
https://arxiv.org/abs/2503.08019

Differs from the release: layer K-1 runs once and only one row of its attention map is computed
(there, it runs twice, fills its cache twice and repeats that at every decoding step); keys of
layer K are projected for the visual tokens alone; spans and grids are the real ones, so any prompt,
batch and number of images works (there, 576 tokens from place 35); all arithmetic is fp32 (there,
ties of half precision fall as the device likes); a picked patch is never picked again. On
LLaVA-NeXT, where nothing was released, the overview and the unpadded tiles with their newlines are
one grid each: prior and damping stay inside a grid, the picks compete across both.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import DecoderPruner
from .captured import captured
from .extras import with_extra
from .ops import normalize
from .option_types import check_share
from .prefill import Prefill
from .tokens import ImageTokens

#: the extra that says where a token stands, see `cells_of`
CELL = "cell"


@dataclass
class AdaptPrune(DecoderPruner):
    """
    visual_token_num: tokens per image from `layer` on; the layers before it see all of them
    layer:            K, the first decoder layer that sees fewer tokens (at least 1); None: 2 of 32
                      layers, scaled to the depth of the decoder
    keep_ratio:       share of an image's tokens that is kept, 0 to 1 (paper: 0.1), rounded down;
                      replaces `visual_token_num`. None: the budget counts
    distance_limit:   radius in patches within which a pick damps others; 0 damps nothing
    distance_sigma:   width in patches of the damping over distance; larger spreads picks further
    similarity_sigma: width of the damping over 1 - cosine of the keys; larger damps also patches
                      that are less alike
    prior_sigma:      width in patches of the preference for the centre; None: half the side of the
                      grid, along each axis (12 on 24 x 24)
    """

    keep_ratio: float | None = None
    distance_limit: float = 5.0
    distance_sigma: float = 1.5
    similarity_sigma: float = 0.05
    prior_sigma: float | None = None

    name = "adaptprune"
    paper_layer = 2

    def __post_init__(self):
        super().__post_init__()
        check_share("keep_ratio", self.keep_ratio)
        if self.distance_limit < 0:
            raise ValueError(f"distance_limit ({self.distance_limit}) must be at least 0 patches")
        for name in ("distance_sigma", "similarity_sigma", "prior_sigma"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} ({value}) must be above 0")

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        if self.keep_ratio is None:
            super().check(num_patches, num_layers, crops)
        else:  # the budget is not used
            self.check_depth(num_layers)

    @property
    def by_share(self) -> bool:
        return self.keep_ratio is not None or super().by_share

    def left_of(self, count: int) -> int:
        if self.keep_ratio is None:
            return super().left_of(count)
        return int(count * self.keep_ratio)

    def before_prompt(self, image: ImageTokens) -> ImageTokens:
        return with_extra(image, CELL, cells_of(image))

    def score(self, prefill: Prefill) -> Tensor:
        """(B, S) the earlier a token is picked, the higher; 0 on those never picked."""
        row, place, real = prefill.images()
        rounds = self.left_of(real.shape[1])
        if rounds >= real.shape[1]:  # everything stays
            return torch.zeros_like(prefill.index)
        attention = prefill.recorded_rows[:, :, -1].mean(dim=1)
        keys = prefill.decoder.layers[prefill.layer].self_attn.k_proj(
            prefill.hidden_states[row, place]
        )
        cells = prefill.extras[CELL][row, place]
        order = self.pick(attention[row, place], keys, cells, rounds, real)
        # An image with fewer tokens than rounds has been picked empty before the last one.
        number = torch.arange(rounds, device=order.device)
        picked = number < real.sum(dim=1, keepdim=True)
        return prefill.from_images(rounds - number, row, place.gather(1, order), picked)

    def pick(
        self,
        attention: Tensor,
        keys: Tensor,
        cells: Tensor,
        rounds: int,
        real: Tensor | None = None,
    ) -> Tensor:
        """(G, rounds) places of the picks in order, from attention (G, V), keys (G, V, C) before
        any rotation, and cells (G, V, 5) of `cells_of`; real: (G, V) False on padding, which comes
        last; None: there is none."""
        if not rounds:
            return cells[:, :0, 0]
        score = self.prior(cells) * attention
        if real is not None:
            score = score.masked_fill(~real, -torch.inf)
        return damped_picks(score, self.damping(keys, cells), rounds)

    def prior(self, cells: Tensor) -> Tensor:
        """(G, V) preference for the centre of the own grid, 1 at its middle."""
        _, row, column, rows, columns = cells.unbind(dim=-1)
        return self.axis_prior(row, rows) * self.axis_prior(column, columns)

    def axis_prior(self, index: Tensor, length: Tensor) -> Tensor:
        half = (length // 2).float()
        step = 2 * half / (length - 1).clamp(min=1)
        place = step * index - half
        nearest = step * ((length - 1) // 2) - half  # of the cells, to the middle
        sigma = half.clamp(min=0.5) if self.prior_sigma is None else self.prior_sigma
        return ((nearest**2 - place**2) / (2 * sigma**2)).exp()

    def damping(self, keys: Tensor, cells: Tensor) -> Tensor:
        """(G, V, V) what a pick (second axis) leaves of the score of every token (third axis)."""
        block, row, column, _, _ = cells.unbind(dim=-1)
        down, across = (x[:, :, None] - x[:, None, :] for x in (row, column))
        distance = (down**2 + across**2).float()
        unit = normalize(keys)
        unlike = 1 - unit @ unit.transpose(1, 2)
        damped = (
            -distance / (2 * self.distance_sigma**2) - unlike**2 / (2 * self.similarity_sigma**2)
        ).exp()
        near = (distance <= self.distance_limit**2) & (block[:, :, None] == block[:, None, :])
        left = (1 - damped).clamp(min=1e-30)  # never 0: a taken token (-inf) must stay taken
        return torch.where(near & (block > 0)[:, None], left, 1.0)


@captured
def damped_picks(score: Tensor, left: Tensor, rounds: int) -> Tensor:
    """(G, rounds) places of the highest scores (G, V) in the order they are picked, each pick
    multiplying all scores by what it leaves of them, its row of `left` (G, V, V)."""
    groups = torch.arange(len(score), device=score.device)
    order, score = [], score.clone()
    for _ in range(rounds):  # four small operations
        order.append(best := score.argmax(dim=1))
        score.mul_(left[groups, best]).scatter_(1, best[:, None], -torch.inf)
    return torch.stack(order, dim=1)


def cells_of(image: ImageTokens) -> Tensor:
    """(n, 5) where every token stands: grid (from 1), row, column, rows and columns of the grid.

    Zeros on tokens that stand in no grid, such as merged ones. Those of the overview have offsets
    behind it, where the tiles begin; what is no patch but stands in a grid is a newline, at the end
    of a row.
    """
    cells, start = image.offsets.new_zeros(len(image.offsets), 5), 0
    for number, (rows, columns) in enumerate(image.blocks, start=1):
        place = image.offsets - start
        cell = torch.stack(
            [
                torch.full_like(place, number),
                place // columns,
                place % columns,
                torch.full_like(place, rows),
                torch.full_like(place, columns),
            ],
            dim=1,
        )
        inside = (place >= 0) & (place < rows * columns)
        inside &= (image.patches >= 0) | (place % columns == columns - 1)
        cells = torch.where(inside[:, None], cell, cells)
        start += rows * columns
    return cells
