"""SinkPruner: patches of very large norm become one token, salient and diverse ones among the
others stay; then three cuts inside the decoder by what the words look at.

Paper: SinkPruner, https://arxiv.org/abs/2609.01004

There is no release: this follows the text, and where that is silent the choice is ours. Salient and
diverse tokens stand in raster order each, behind the token of the sinks; on Qwen2.5-VL, where
tokens stand at places of the picture, all do, the token of the sinks at that of the largest. A cut
before layer L goes by the attention that layer L would have (mean over heads and over the words
behind the image), and survivors keep their positions. Sinks are found crop by crop. In a tower
without a class token the attention that patches receive from all takes its place.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .base import NO_DECODER_STAGE, BudgetPruner, Pruner, SelectPruner
from .captured import captured
from .extras import with_extra, with_number
from .ops import cosines, gather_tokens, interpolate, top_stable
from .own_grids import OwnGrids
from .prefill import Prefill
from .sinks import SinkFilter, check_sink_ratio, num_sinks, sinks
from .staged import BUDGET, CutLayers
from .stages import DecoderStage, VisionStage
from .tokens import MERGED, VisionTokens, without_cues
from .words import mean_attention, words_behind

LAYERS = (2, 6, 15)
#: label of 576 patches -> salient and diverse ones, tokens left by the cuts
PATCHES = 576
TOKENS = {
    0: (0, 0, 0, 0, 0),
    32: (32, 32, 54, 36, 22),
    64: (64, 64, 110, 74, 42),
    128: (128, 128, 230, 130, 92),
    PATCHES: (PATCHES, PATCHES, PATCHES, PATCHES, PATCHES),
}
#: where tokens are blocks of patches, in per cent of them
BLOCK_TOKENS = {
    0: (0, 0, 0, 0, 0),
    100 / 9: (20, 5, 18, 11, 6),
    200 / 9: (45, 5, 30, 20, 12),
    300 / 9: (45, 5, 40, 35, 25),
    100: (100, 100, 100, 100, 100),
}


@dataclass
class SinkPruner(OwnGrids, VisionStage, BudgetPruner, CutLayers):
    """
    visual_token_num:  label of the published settings: 128, 64 or 32 of 576 enter the layers as
                       130, 65 and 33 on average, other numbers are in between; on LLaVA-NeXT the
                       sum over five crops
    sink_ratio:        share of the patches of a crop that is one token afterwards, those of the
                       largest norm; 0: none, and no such token
    salient_token_num: patches of a crop with the most attention that stay; None: as many as the
                       label says
    diverse_token_num: patches of a crop chosen for diversity; None: likewise
    picks_per_round:   of these that are chosen at a time; 1 is the formula of the paper, 16 what
                       its numbers use
    text_pruner:       False: no cuts inside the decoder
    layer_list:        decoder layers that see fewer tokens than the one before; None: 2, 6, 15 of
                       32 layers, scaled to the depth
    cut_token_list:    tokens per crop left by each cut; None: as the label says
    """

    sink_ratio: float = 0.01
    salient_token_num: int | None = None
    diverse_token_num: int | None = None
    picks_per_round: int = 16
    text_pruner: bool = True
    layer_list: Sequence[int] | None = None
    cut_token_list: Sequence[int] | None = None

    name = "sinkpruner"
    needs = frozenset({"salience"})
    anyres_tiles = (2, 2)
    in_raster_order = False
    renumbers = False
    paper_layers = LAYERS
    before_decoder_by = "text_pruner=False"

    def __post_init__(self):
        super().__post_init__()
        check_sink_ratio(self.sink_ratio)
        if self.picks_per_round < 1:
            raise ValueError(f"picks_per_round ({self.picks_per_round}) must be at least 1 patch")
        for name in ("salient_token_num", "diverse_token_num"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0 patches")
        if (self.salient_token_num, self.diverse_token_num) == (0, 0) and not self.sink_ratio:
            raise ValueError("salient_token_num, diverse_token_num and sink_ratio are all 0")
        layers, left = self.layer_list or LAYERS, self.cut_token_list or LAYERS
        if len(left) != len(layers) or (len(layers) != len(LAYERS) and left is LAYERS):
            raise ValueError(
                f"layer_list ({self.layer_list}) and cut_token_list ({self.cut_token_list}) "
                f"must have one entry per cut each; without the second there are {len(LAYERS)}"
            )
        if min(left) < 1:
            raise ValueError(f"cut_token_list ({left}) must be at least 1 token")

    @property
    def decoder(self) -> DecoderStage:
        return self if self.text_pruner else NO_DECODER_STAGE

    def choosing(self, num_tokens: int) -> Pruner:
        """Salient and diverse patches alone, in the proportion that they have in this budget."""
        if (self.salient_token_num, self.diverse_token_num) != (None, None):
            raise ValueError(
                f"{self.name} cannot be asked for a number of tokens beside salient_token_num and "
                "diverse_token_num"
            )
        return Unmerged(
            num_tokens,
            sink_ratio=self.sink_ratio,
            picks_per_round=self.picks_per_round,
            table=BLOCK_TOKENS if self.own_grids else TOKENS,
        )

    # --- how many -----------------------------------------------------------------------------

    def per_patch(self, budget: int, num_patches: int) -> list[float]:
        """Salient and diverse tokens, and those left by the cuts, as shares of the patches of a
        crop whose budget this is."""
        table, whole = (BLOCK_TOKENS, 100) if self.own_grids else (TOKENS, PATCHES)
        return [value / whole for value in interpolate(table, budget / num_patches * whole)]

    def pools(self, budget: int, num_patches: int) -> tuple[int, int, int]:
        """(sinks, salient, diverse) patches of a crop whose budget this is."""
        high = num_sinks(num_patches, self.sink_ratio)
        parts = self.per_patch(budget, num_patches)[:2]
        given = (self.salient_token_num, self.diverse_token_num)
        pairs = zip(given, parts, strict=True)
        salient, diverse = (
            max(1, round(part * num_patches)) if own is None else own for own, part in pairs
        )
        salient = min(salient, num_patches - high)
        return high, salient, min(diverse, num_patches - high - salient)

    def entering(self, budget: int, num_patches: int) -> int:
        """Tokens of a crop that enter the decoder."""
        if budget >= num_patches:
            return num_patches
        high, *pools = self.pools(budget, num_patches)
        return sum(pools) + (high > 0)

    def image_schedule(
        self, count: int, num_layers: int, num_patches: int, budget: int = 0
    ) -> list[int]:
        """budget: of a crop."""
        plan = [count] * num_layers
        if not self.text_pruner or not count or budget >= num_patches:
            return plan
        crops = max(1, count // self.entering(budget, num_patches))
        left = self.cut_token_list
        if left is None:
            shares = self.per_patch(budget, num_patches)[2:]
            left = [round(share * num_patches * crops) for share in shares]
        else:
            left = [number * crops for number in left]
        for layer, number in zip(self.cut_layers(num_layers), left, strict=True):
            plan[layer:] = [max(1, min(plan[layer], number))] * (num_layers - layer)
        return plan

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        budget = self.with_budget_of(num_patches * crops, crops).tokens_per_crop(crops)
        first = self.entering(budget, num_patches) * crops
        return self.image_schedule(first, num_layers, num_patches, budget)

    # --- before the projector -----------------------------------------------------------------

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        self.check_model(vision)
        num_patches = vision.features.shape[1]
        budget = self.tokens_per_crop(vision.crops_in_budget)
        vision = with_number(vision, BUDGET, [budget] * len(vision.crops_of_images()))
        if budget >= num_patches:
            return vision
        pools = self.pools(budget, num_patches)
        high, salient, diverse = sanitize(
            vision.features, vision.cue("salience"), *pools, self.picks_per_round
        )
        kept = torch.cat([high[:, :1], salient.sort(1).values, diverse.sort(1).values], dim=1)
        clean = without_cues(vision).keep(kept)
        if not pools[0]:
            return clean
        clean.features[:, 0] = sink_token(vision.features, high)
        merged = torch.zeros_like(kept, dtype=torch.bool)
        merged[:, 0] = True
        clean = with_extra(clean, MERGED, merged)
        if self.own_grids:
            return clean.keep(clean.positions.argsort(dim=1))
        clean.positions[:, 0] = -1  # it stands for no place
        return clean

    # --- inside the decoder -------------------------------------------------------------------

    def score(self, prefill: Prefill, kept: list[list[int]]) -> Tensor:
        """(B, S) what the words behind an image look at in the layer about to run."""
        words = words_behind(prefill)
        rows = prefill.attention_rows(prefill.layer, words.rows).mean(dim=1)
        return mean_attention(prefill, rows, words.own)


@dataclass
class Unmerged(SinkFilter, SelectPruner):
    """The patches that the sanitiser keeps as they are, for a wrapper that merges the others.

    visual_token_num: salient and diverse ones together, as in `SelectPruner`
    picks_per_round:  as in `SinkPruner`
    table:            `TOKENS` or `BLOCK_TOKENS`
    """

    picks_per_round: int = 16
    table: Mapping[Any, Sequence[float]] = field(default_factory=lambda: TOKENS)

    name = SinkPruner.name
    needs = frozenset({"salience"})
    anyres_tiles = SinkPruner.anyres_tiles

    def select(self, vision: VisionTokens) -> Tensor:
        count, size = self.num_keep(vision), math.prod(vision.grid)
        salient, diverse = interpolate(self.table, count / size * max(self.table))[:2]
        num_diverse = int(count * diverse / (salient + diverse))
        pools = 0, count - num_diverse, num_diverse  # sinks are no candidates
        found = sanitize(vision.features, vision.cue("salience"), *pools, self.picks_per_round)
        return torch.cat(found[1:], dim=1)


def sink_token(features: Tensor, high: Tensor) -> Tensor:
    """(B, C) mean of the features (B, N, C) at places `high` (B, H)."""
    return gather_tokens(features, high).float().mean(dim=1).to(features.dtype)


@captured
def sanitize(
    features: Tensor, salience: Tensor, num_high: int, num_salient: int, num_diverse: int, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Places of the sinks (B, num_high), largest norm first, of the salient tokens (B,
    num_salient), most attention first, and of the diverse ones (B, num_diverse) in the order they
    are picked, of features (B, N, C) and the attention (B, N) they receive.

    Diverse are, `step` at a time, those that resemble no salient or picked one (largest cosine to
    any of them smallest; equal: the lower place).
    """
    high = sinks(features, num_high)
    salience = salience.float().scatter(1, high, -torch.inf)
    salient = top_stable(salience, num_salient)
    cosine = cosines(features.detach())
    alike = torch.full_like(salience, -1.0)
    if num_salient:
        alike = gather_tokens(cosine, salient).amax(dim=1)
    alike = alike.scatter(1, torch.cat([high, salient], dim=1), torch.inf)
    picks = [high[:, :0]]
    while (missing := num_diverse - sum(own.shape[1] for own in picks)) > 0:
        own = alike.argsort(dim=1, stable=True)[:, : min(step, missing)]
        picks.append(own)
        if missing > step:  # five small operations
            near = gather_tokens(cosine, own).amax(dim=1)
            alike = torch.maximum(alike, near).scatter_(1, own, torch.inf)
    return high, salient, torch.cat(picks, dim=1)
