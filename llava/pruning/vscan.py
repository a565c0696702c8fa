"""VScan: patches a shallow and a deep tower layer look at, the others merged into them; then a cut
in the middle of the decoder.

Paper: VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models,
https://arxiv.org/abs/2505.22654

Differs from the release: on LLaVA-NeXT the cut in the decoder ranks all tokens of the image with
the last prompt token and keeps the same share of them as on LLaVA-1.5 (there, the overview alone is
cut, by a row of the map that belongs to an image token); budgets below two tokens per window have
no local picks (there, an error); any grid, batch and image number; no attention map.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import BudgetPruner
from .captured import captured
from .extras import with_number
from .ops import gather_tokens, normalize, rank_within_groups, scale_layer, top_stable, true_first
from .own_grids import OwnGrids
from .published import Published
from .sinks import SinkFilter, without_marks
from .staged import BUDGET, CutLayers
from .stages import VisionStage
from .tokens import VisionTokens

#: the local layer counts in a 24-layer tower, the cut in a 32-layer decoder
LOCAL_LAYER, TOWER_DEPTH, CUT_LAYERS = 5, 24, (16,)
#: side of the windows where a token is a block of patches
BLOCK_WINDOW = 4
#: the attention of a sink, which counts behind all others: attention is 0 or above, and a patch
#: beyond the share of its window counts -1
SINK = -2.0


@dataclass
class VScan(SinkFilter, OwnGrids, VisionStage, BudgetPruner, CutLayers):
    """
    visual_token_num:  tokens per image, averaged over the decoder layers; on LLaVA-NeXT the sum
                       over its crops. The two counts below follow from it unless they are given
    encoder_token_num: tokens of each crop that leave the vision stage (less where half of them is
                       no multiple of the windows: 150 of 576 become 139). None: 1.5 x the budget
    encoder_token_ratio: the same as a share of the patches, rounded down (on Qwen2.5-VL 0.167, for
                       finding things 0.6, in the release)
    layer_list:        decoder layers that see fewer tokens than the one before. None: 16 of 32
                       layers, scaled to the depth
    image_token_list:  tokens per crop left after each cut; an image of several crops keeps that
                       share of its tokens. None: what gives the average, 0.5 x the budget
    cut_ratio_list:    the same as shares of what an image had before each cut, rounded down (on
                       Qwen2.5-VL 0.333, or 0.67, in the release)
    local_layer:       tower layer (0-based) of the local picks. None: 5 of 24, scaled
    window:            side of the windows that share the local picks, in patches; where tokens are
                       blocks of patches, windows are 4 x 4 blocks
    sink_ratio:        share of the patches left out, of the merging as well, those of the largest
                       norm; 0: none
    """

    encoder_token_num: int | None = None
    encoder_token_ratio: float | None = None
    layer_list: Sequence[int] | None = None
    image_token_list: Sequence[int] | None = None
    cut_ratio_list: Sequence[float] | None = None
    local_layer: int | None = None
    window: int = 6

    name = "vscan"
    published = Published(
        options={"image_token_ratio": "encoder_token_ratio"},
        meaning={"visual_token_num": "encoder_token_num"},
    )
    needs = frozenset({"salience"})
    paper_layers = CUT_LAYERS

    def __post_init__(self):
        super().__post_init__()
        first, later = self.encoder_token_num, self.image_token_list
        if min([1 if first is None else first, *(later or ())]) < 1:
            raise ValueError(
                f"encoder_token_num ({first}) and image_token_list ({later}) must be at least 1 "
                "token"
            )
        if self.window < 1:
            raise ValueError(f"window ({self.window}) must be at least 1 patch")
        stages = len(self.layer_list or CUT_LAYERS)
        left = self.image_token_list or self.cut_ratio_list or [1]
        if stages != len(left):
            raise ValueError(
                f"layer_list ({self.layer_list}) and image_token_list ({self.image_token_list}) or "
                f"cut_ratio_list ({self.cut_ratio_list}) must have one entry per cut each"
            )
        self._check_shares()

    def _check_shares(self) -> None:
        pairs = (
            ("encoder_token_num", "encoder_token_ratio"),
            ("image_token_list", "cut_ratio_list"),
        )
        for number, share in pairs:
            if None not in (getattr(self, number), getattr(self, share)):
                raise ValueError(f"{number} and {share} say the same: give one of them")
        given = [("encoder_token_ratio", self.encoder_token_ratio)]
        given += [("cut_ratio_list", own) for own in self.cut_ratio_list or ()]
        for name, value in given:
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} ({value}) must lie above 0 and up to 1")

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        super().check(num_patches, num_layers, crops)
        if (self.encoder_token_num or 1) > num_patches:
            raise ValueError(
                f"encoder_token_num ({self.encoder_token_num}) exceeds the {num_patches} patches "
                "of a crop"
            )
        if self.image_token_list is None and self.cut_ratio_list is None:
            self._check_average(num_patches, num_layers, crops)
        self.token_schedule(num_patches, num_layers, crops)

    def _check_average(self, num_patches: int, num_layers: int, crops: int) -> None:
        """Raises ValueError when the layers before the cut alone exceed the average."""
        total = num_patches * crops
        budget, first = self.tokens_of(total) // crops, self.cut_layers(num_layers)[0]
        wanted = self.encoder_tokens(budget, num_patches)
        least = (wanted * first + num_layers - first) / num_layers
        if least >= budget + 1:
            raise ValueError(
                f"visual_token_num ({self.tokens_of(total)}) is out of reach: {wanted} tokens of a "
                f"crop in the first {first} of {num_layers} layers, and one in the others, are "
                f"{least:.1f} on average; give image_token_list or cut_ratio_list, fewer tokens of "
                "the vision stage (encoder_token_num), or an earlier layer_list"
            )

    def tower_extras(self, num_layers: int, selected: int) -> dict[int, frozenset[str]]:
        local = self.local_layer
        if local is None:
            local = min(scale_layer(LOCAL_LAYER, num_layers, TOWER_DEPTH), selected)
        if not 0 <= local <= selected:
            raise ValueError(f"local_layer ({local}) must be one of the {selected + 1} layers run")
        return {local: frozenset({"salience"})}

    def encoder_tokens(self, budget: int, num_patches: int) -> int:
        """T, the tokens a crop is asked to keep in the vision stage; `budget` is that of a crop."""
        wanted = self.encoder_token_num or max(1, int(1.5 * budget))
        if self.encoder_token_ratio is not None:
            wanted = max(1, int(self.encoder_token_ratio * num_patches))
        return min(wanted, num_patches)

    # --- vision stage -------------------------------------------------------------------------

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        """Tokens are merged in the space of the language model, sinks are known before it."""
        budget = self.tokens_per_crop(vision.crops_in_budget)
        wanted = self.encoder_tokens(budget, vision.features.shape[1])
        return self.with_sinks_marked(vision, wanted)

    def after_projector(self, vision: VisionTokens) -> VisionTokens:
        vision, sinks = without_marks(vision)
        num_patches = vision.features.shape[1]
        budget = self.tokens_per_crop(vision.crops_in_budget)
        wanted = self.encoder_tokens(budget, num_patches)
        self.check_model(vision)
        if wanted == num_patches:
            kept = vision
        else:
            index = self.select(vision, wanted, sinks)
            kept = vision.keep(index)
            kept.features = absorb(vision.features, index, sinks)
        return with_number(kept, BUDGET, [budget] * len(vision.crops_of_images()))

    def select(self, vision: VisionTokens, wanted: int, sinks: Tensor | None = None) -> Tensor:
        """(B, K) patches to keep, ascending; K = `num_selected`, or `wanted` of blocks.

        sinks: (B, N) True on patches that are taken where a window has no others alone
        """
        blocks, rest = vision.block > 1, vision.cue("salience")
        pick = self.block_picks if blocks else self.local_picks
        local = pick(vision, wanted, sinks)
        if sinks is not None:
            rest = rest.masked_fill(sinks, SINK)
        rest = rest.masked_fill(local, SINK - 1)
        best = top_stable(rest, wanted - wanted // 2)
        count = wanted if blocks else self.num_selected(wanted, vision.grid)
        chosen = true_first(local.scatter(1, best, True))
        return chosen[:, :count].sort(dim=1).values

    def local_picks(self, vision: VisionTokens, wanted: int, sinks: Tensor | None = None) -> Tensor:
        """(B, N) True on the patches of every window that the shallow layer looks at most."""
        row, column = vision.positions // vision.grid[1], vision.positions % vision.grid[1]
        across = math.ceil(vision.grid[1] / self.window)
        group = row // self.window * across + column // self.window
        quota = wanted // 2 // self.num_windows(vision.grid)
        return rank_within_groups(local_score(vision, sinks), group) < quota

    def block_picks(self, vision: VisionTokens, wanted: int, sinks: Tensor | None = None) -> Tensor:
        """(B, N) True on the half of the tokens that the shallow layer looks at most, no more than
        its share in any window. As released for towers whose tokens are blocks of patches: windows
        of 4 x 4 blocks, of which incomplete ones join the last full one."""
        side, (rows, columns) = BLOCK_WINDOW, vision.grid
        down, across = max(1, rows // side), max(1, columns // side)
        row = (vision.positions // columns // side).clamp(max=down - 1)
        column = (vision.positions % columns // side).clamp(max=across - 1)
        score, half = local_score(vision, sinks), wanted // 2
        fits = rank_within_groups(score, row * across + column) < math.ceil(half / (down * across))
        picks = top_stable(torch.where(fits, score, score.clamp(max=-1.0)), half)
        return torch.zeros_like(fits).scatter(1, picks, True)

    def num_windows(self, grid: tuple[int, int]) -> int:
        return math.prod(math.ceil(side / self.window) for side in grid)

    def num_selected(self, wanted: int, grid: tuple[int, int]) -> int:
        """Tokens a crop really keeps when it is asked for `wanted`."""
        if wanted == math.prod(grid):
            return wanted
        quota = wanted // 2 // self.num_windows(grid)
        rows, columns = (
            [min(self.window, side - start) for start in range(0, side, self.window)]
            for side in grid
        )
        local = sum(min(quota, height * width) for height in rows for width in columns)
        return local + wanted - wanted // 2

    # --- decoder stage ------------------------------------------------------------------------

    def image_schedule(
        self, count: int, num_layers: int, num_patches: int, budget: int = 0
    ) -> list[int]:
        layers, wanted = self.cut_layers(num_layers), self.encoder_tokens(budget, num_patches)
        plan = [count] * num_layers
        if self.cut_ratio_list is not None:
            for layer, share in zip(layers, self.cut_ratio_list, strict=True):
                plan[layer:] = [max(1, int(share * plan[layer]))] * (num_layers - layer)
            return plan
        left = self.image_token_list
        if left is None:
            rest = budget * num_layers - wanted * layers[0]
            left = [max(1, rest // (num_layers - layers[0]))]
        for layer, number in zip(layers, left, strict=True):
            number = number if count <= wanted else count * number // wanted
            plan[layer:] = [min(plan[layer], number)] * (num_layers - layer)
        return plan

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        self, side = self.with_budget_of(num_patches * crops), math.isqrt(num_patches)
        budget = self.tokens_per_crop(crops)
        wanted = self.encoder_tokens(budget, num_patches)
        kept = wanted if self.own_grids else self.num_selected(wanted, (side, side))
        return self.image_schedule(kept * crops, num_layers, num_patches, budget)


def local_score(vision: VisionTokens, sinks: Tensor | None = None) -> Tensor:
    """(B, N) attention that patches receive in the shallow layer, `SINK` where `sinks` is True."""
    score = vision.layer_cue("salience")
    return score if sinks is None else score.masked_fill(sinks, SINK)


@captured
def absorb(features: Tensor, index: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Tokens at `index` (B, K) of `features` (B, N, D), each averaged with those of the others that
    point its way most (cosine; equal: the earlier one), but for those where `left_out` (B, N) is
    True."""
    unit = normalize(features)
    nearest = (unit @ gather_tokens(unit, index).transpose(1, 2)).argmax(dim=-1)  # (B, N)
    own = torch.arange(index.shape[1], device=index.device)
    nearest = nearest.scatter(1, index, own.expand_as(index))
    share = (nearest[..., None] == own).float()  # (B, N, K)
    if left_out is not None:
        share = share.masked_fill(left_out.scatter(1, index, False)[..., None], 0.0)
    total = share.transpose(1, 2) @ features.float()
    return (total / share.sum(dim=1)[..., None]).to(features.dtype)
