"""MustDrop: even windows are merged early in the vision tower, then what little text looks at is
dropped at four decoder layers, by thresholds; the caches follow after the prefill. Where tokens are
blocks of patches (Qwen2.5-VL, for which nothing was released), even windows are told by the first
tower layer as well, but merged behind the tower.

Paper: Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model,
https://arxiv.org/abs/2411.10803

Differs from the release: a generated token stands behind the tokens that the layer really ran on
(there, behind the shortened cache, before some of its own keys); the crops of one image share a
count of merged windows (there, all crops of a call); cache cuts follow the depth (there, 32
layers); any batch, image number, grid and backend works, without attention maps. Patches beside
the last full window are left alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .counts import Known
from .extras import with_extra, with_number, without_extra
from .ops import (
    gather_tokens,
    lookup,
    normalize,
    ranks,
    scale_layers,
    top_stable,
    true_first,
)
from .option_types import check_share
from .own_grids import OwnGrids
from .prefill import NARROW, Prefill
from .staged import StageLayers
from .stages import Probe, VisionStage
from .tokens import MERGED, ImageTokens, TowerTokens, VisionTokens

LAYERS = (2, 6, 10, 14)
#: published label -> (global_thr, individual_thr)
THRESHOLDS = {192: (0.001, 0.001), 128: (0.0012, 0.001), 64: (0.011, 0.01)}

#: tokens of the images that these are for
PUBLISHED_LENGTH = 576
#: the extra that is True on the tokens that are never dropped
KEY = "key"
#: the extra, on the way, of how much attention a token received in the tower
SCORE = "score"
#: the number of an image that says how many tokens it has unpruned
LENGTH = "length"


@dataclass
class MustDropState:
    """What a prefill remembers.

    most_rows: the most text tokens behind its first image that a prompt has
    real:      (B, R) which of the rows recorded last are such tokens
    ahead:     (B, R) how far these stand before the last token of the prompt, which stays where
               they all follow the one image of their row; None: they have to be looked for
    """

    most_rows: int
    real: Tensor | None = None
    ahead: Tensor | None = None


@dataclass
class MustDrop(OwnGrids, VisionStage, StageLayers):
    """
    visual_token_num:  label of a published setting of the two thresholds: 192, 128 or 64 tokens on
                       average. How many are really kept depends on image and question
    global_thr:        a token is dropped when its share of the attention that the text pays to the
                       image is below this ... None: what the label says
    individual_thr:    ... and no text token pays it as much attention as this. None: likewise
    spatial_threshold: windows whose patches resemble each other this much on average (cosine, after
                       the first tower layer) become one token
    window:            side of the windows, in patches; in tokens where those are blocks of patches
    key_ratio:         share of the tokens that are never dropped: those that receive most attention
                       in the last tower layer, from the class token where there is one
    pruning_layers:    layers (0-based) of which the attention counts; the layer after each sees
                       fewer tokens. None: 2, 6, 10, 14 of 32 layers, scaled to the depth
    """

    visual_token_num: int = 64
    global_thr: float | None = None
    individual_thr: float | None = None
    spatial_threshold: float = 0.8
    window: int = 3
    key_ratio: float = 0.08
    pruning_layers: Sequence[int] | None = None

    name = "mustdrop"
    anyres_config = {"mm_patch_merge_type": "flat"}
    adaptive = True
    reads_text = True
    merges_blocks = True
    declines = {
        "sink_ratio": "what the words look at too little is dropped, whatever its number, and what "
        "class tokens look at is only kept from that, so no other patch would take a sink's place"
    }

    def __post_init__(self):
        given = (self.global_thr, self.individual_thr)
        if None in given and self.visual_token_num not in THRESHOLDS:
            raise ValueError(
                f"visual_token_num ({self.visual_token_num}) must be one of the published settings "
                f"{', '.join(map(str, THRESHOLDS))}, or give global_thr and individual_thr"
            )
        if self.window < 2:
            raise ValueError(f"window ({self.window}) must be at least 2 patches")
        check_share("key_ratio", self.key_ratio)

    @property
    def thresholds(self) -> tuple[float, float]:
        both, single = self.global_thr, self.individual_thr
        if both is None or single is None:  # then the number has its own
            label = THRESHOLDS[self.visual_token_num]
            both = label[0] if both is None else both
            single = label[1] if single is None else single
        return both, single

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        return tuple(self.pruning_layers or scale_layers(LAYERS, num_layers))

    # --- vision tower -------------------------------------------------------------------------

    def tower_extras(self, num_layers: int, selected: int) -> dict[int, frozenset[str]]:
        last = {num_layers - 1: frozenset({"salience"})}
        return {0: frozenset({"output"}), **last} if self.own_grids else last

    def before_tower_layer(self, index: int, tokens: TowerTokens) -> TowerTokens:
        if index != 1:
            return tokens
        patches, side = tokens.hidden_states[:, 1:], math.isqrt(tokens.positions.shape[1])
        across = side // self.window
        if across == 0:
            return tokens
        members = self.windows((side, side), patches.device)  # (W, w * w)
        blocks = patches[:, members]  # (B, W, w * w, C)
        evenness = mean_similarity(blocks)
        num_even = (evenness >= self.spatial_threshold).sum(dim=1)
        shared = num_even.new_full((len(patches),), across**2)
        shared = shared.scatter_reduce(0, tokens.image_index, num_even, "amin")
        num_even = shared[tokens.image_index]  # (B,) the same for all crops of an image

        order = top_stable(evenness, across**2)  # (B, W) most even first
        means = gather_tokens(blocks.float().mean(dim=2).to(patches.dtype), order)
        slot = torch.arange(across**2, device=patches.device)
        made = slot < num_even[:, None]
        merged_in = torch.zeros_like(made).scatter(1, order, made)  # (B, W) by window
        gone = torch.zeros_like(tokens.positions, dtype=torch.bool)
        gone[:, members.flatten()] = merged_in.repeat_interleave(self.window**2, dim=1)
        alive = torch.cat([made, ~gone], dim=1)
        counts = alive.sum(dim=1).tolist()
        place = true_first(alive)
        place = place[:, : max(counts)]
        valid = None if min(counts) == max(counts) else alive.gather(1, place)
        states = gather_tokens(torch.cat([means, patches], dim=1), place)
        is_merged = place < across**2
        positions = torch.cat([torch.full_like(order, -1), tokens.positions], dim=1)
        return TowerTokens(
            hidden_states=torch.cat([tokens.hidden_states[:, :1], states], dim=1),
            positions=positions.gather(1, place),
            image_index=tokens.image_index,
            valid=valid,
            extras={**tokens.extras, MERGED: is_merged},
            known=Known((valid,), counts),
        )

    def windows(self, grid: tuple[int, int], device) -> Tensor:
        """(W, window^2) patches of every full window of an (h, w) grid, row-major."""
        rows, columns = (side // self.window * self.window for side in grid)
        patches = torch.arange(math.prod(grid), device=device).view(grid)[:rows, :columns]
        patches = patches.unflatten(1, (-1, self.window)).unflatten(0, (-1, self.window))
        return patches.transpose(1, 2).reshape(-1, self.window**2)

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        """Marks the tokens that are never dropped."""
        self.check_model(vision)
        return vision if self.own_grids else self.with_keys(vision, vision.layer_cue("salience"))

    def after_projector(self, vision: VisionTokens) -> VisionTokens:
        """Where tokens are blocks of patches, merges those of even windows, each into the one in
        the middle, and marks tokens likewise."""
        if not self.own_grids:
            return vision
        score, features = vision.layer_cue("salience"), vision.features
        members = self.windows(vision.grid, features.device)  # (W, w * w)
        first, vision = vision.layers[0]["output"], replace(vision, layers={})
        if not len(members):
            return self.with_keys(vision, score)
        even = mean_similarity(first[:, members]) >= self.spatial_threshold  # (B, W)
        middle = members[:, self.window**2 // 2]
        whole = features[:, members].float().mean(dim=2).to(features.dtype)
        features, score, merged = features.clone(), score.clone(), torch.zeros_like(score).bool()
        features[:, middle] = torch.where(even[..., None], whole, features[:, middle])
        score[:, middle] = torch.where(even, score[:, members].mean(dim=2), score[:, middle])
        kept = torch.ones_like(merged)
        kept[:, members] = ~even[..., None].expand(-1, -1, members.shape[1])
        kept[:, middle], merged[:, middle] = True, even
        vision = with_extra(replace(vision, features=features), MERGED, merged)
        vision = with_extra(vision, SCORE, score).keep_mask(kept)
        return self.with_keys(without_extra(vision, SCORE), vision.extras[SCORE])

    def with_keys(self, vision: VisionTokens, score: Tensor) -> VisionTokens:
        """`vision` with the tokens marked that have the best `score` (B, N)."""
        if vision.valid is None:
            num_keys: int | Tensor = share_up(score.shape[1], self.key_ratio)
        else:
            score, count = score.masked_fill(~vision.valid, -1.0), vision.valid.sum(dim=1)
            num_keys = lookup(share_up, count, self.key_ratio, score.shape[1])[:, None]
        return with_extra(vision, KEY, ranks(score) < num_keys)

    # --- decoder ------------------------------------------------------------------------------

    def before_prompt(self, image: ImageTokens) -> ImageTokens:
        """Leaves how many tokens the unpruned image has."""
        return with_number(image, LENGTH, image.length)

    def probe(self, num_layers: int) -> Probe:
        return Probe(self.stage_layers(num_layers), self.text_rows)

    def blind_cuts(self, num_layers: int) -> tuple[int, ...]:
        return tuple(layer + 1 for layer in self.stage_layers(num_layers))

    def text_rows(self, prefill: Prefill) -> Tensor:
        """Places (B, R) of the text behind the first image; which of them are real is noted."""
        if prefill.state is None:  # text is never dropped: the count stays
            prefill.state = MustDropState(max(1, *prefill.counts.behind))
        state: MustDropState = prefill.state
        if state.ahead is not None:
            return prefill.last[:, None] - state.ahead
        visual = prefill.is_visual
        flags = ~visual & (visual.cumsum(dim=1) > 0)
        if prefill.valid is not None:
            flags = flags & prefill.valid
        rows, state.real = prefill.places(flags, state.most_rows)
        if prefill.most_images == 1:
            state.ahead = prefill.last[:, None] - rows
        return rows

    def before_layer(self, index: int, prefill: Prefill) -> Prefill:
        if index - 1 not in self.stage_layers(len(prefill.decoder.layers)):
            return prefill
        seen = prefill.recorded_rows.mean(dim=1) * prefill.state.real[..., None]  # (B, R, S)
        total, most = seen.sum(dim=1), seen.amax(dim=1)
        owner = prefill.visual_index + 1  # 0 for text
        images = total.new_zeros(len(total), 1 + prefill.most_images).scatter_add(1, owner, total)
        share, single = self.limits(prefill)
        seen_enough = (total >= share * prefill.at_tokens(images[:, 1:])) | (most >= single)
        kept = seen_enough | (owner == 0) | prefill.extras[KEY]
        last = index - 1 == self.stage_layers(len(prefill.decoder.layers))[-1]
        if not last and kept.numel() <= NARROW and kept.device.type != "cpu":
            return prefill.hide(kept, renumber=True)  # on a CPU there is nothing to wait for
        return prefill.keep(kept, renumber=True)

    def limits(self, prefill: Prefill) -> tuple[float | Tensor, float | Tensor]:
        """`thresholds`; where images have grids of their own, one (B, S) each of those that a label
        stands for: they are for images of 576 tokens, and shares shrink as images grow."""
        if not self.own_grids:
            return self.thresholds
        length = prefill.at_tokens(prefill.image_values(LENGTH)).clamp(min=1)
        given = (self.global_thr, self.individual_thr)
        pairs = zip(given, self.thresholds, strict=True)
        first, second = (
            PUBLISHED_LENGTH / length * label if own is None else own for own, label in pairs
        )
        return first, second

    def pruned_caches(self, index: int, num_layers: int) -> range:
        """After the last cut the layers from the first cut on hold its survivors alone."""
        layers = self.stage_layers(num_layers)
        return range(layers[0], index) if index == layers[-1] + 1 else range(0)


def share_up(count: int, share: float) -> int:
    """A share of `count`, rounded up."""
    return math.ceil(count * share)


def mean_similarity(blocks: Tensor) -> Tensor:
    """(B, W) mean cosine between different tokens of each block (B, W, n, C)."""
    unit, size = normalize(blocks), blocks.shape[2]
    gram = unit @ unit.transpose(2, 3)
    alone = gram.diagonal(dim1=2, dim2=3).sum(dim=-1)
    return (gram.sum(dim=(2, 3)) - alone) / (size * (size - 1))
