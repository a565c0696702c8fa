"""SparseVLM: words of the question that look at the image rate its tokens, in three stages; some of
the dropped tokens come back as a few merged ones.

Paper: SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference,
https://arxiv.org/abs/2410.04417

Differs from the release: only the rows of the rating words are computed, in three layers (there,
every layer builds its map); ties in the clustering go to the earlier token (there, random noise);
an image that already has no more tokens than a stage allows is left alone (there, it loses one);
LLaVA-NeXT, several images per prompt, any budget, sampling and beams work; without a rating word
all text after the image rates, without text after it the last prompt token does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import ShareOption, check_budget
from .density_peaks import cluster
from .ops import (
    gather_tokens,
    interpolate,
    on_device,
    scale_layers,
    top_stable,
    true_first,
)
from .option_types import check_choice
from .prefill import Prefill
from .published import Published
from .staged import StageLayers
from .stages import Probe

LAYERS = {"1.0": (2, 6, 15, 19), "1.5": (2, 6, 15), "2.0": (2, 6, 15)}
#: tokens left at each stage for a published budget, of 576
PATCHES = 576
RETAINED = {
    "1.5": {64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110)},
    "2.0": {64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118)},
}


@dataclass
class SparseState:
    """What a prefill remembers.

    raters: (B, I, S) True on the words of the prompt that rate each image
    most:   the most of them a row has
    totals: tokens of every image of every row as they entered the decoder
    counts: those that are left
    asked:  places (B, R) of all rating words in the layer before, and (B, I, R) who rates an image
    ahead:  (B, R) how far the rating words stand before the last token of the prompt, and who rates
            an image, which both stay where they all follow the one image of their row; None: they
            have to be looked for
    """

    raters: Tensor
    most: int
    totals: list[list[int]]
    counts: list[list[int]]
    asked: tuple[Tensor, Tensor] | None = None
    ahead: tuple[Tensor, Tensor] | None = None


@dataclass
class SparseVLM(ShareOption, StageLayers):
    """
    visual_token_num:   label of the published settings, 192, 128, 96 and 64 of 576 tokens; between
                        them the tokens of each stage are interpolated. More tokens than this enter
                        the layers on average (192: 206.5), see `token_schedule`
    retained_tokens:    tokens of an image left at each stage, of 576; scaled to its size. None:
                        what the label says. A single number is the label, as in the release
    pruning_layers:     layers (0-based) of which the attention rates; the layer after each sees
                        fewer tokens. None: 2, 6, 15 of 32 layers, scaled to the depth
    version:            "1.5": merged tokens; "2.0" (SparseVLM+): none, rating without the pull of
                        near positions, best heads alone, positions keep their gaps; "1.0": merged
                        tokens, as many kept as scale * rank of the ratings + bias, 4 stages
    num_selected_heads: heads that rate in version 2.0
    scale, bias:        of version 1.0: 13.5, 0 / 9, 6 / 0.8, 0 for 192 / 128 / 64
    """

    visual_token_num: int = 192
    retained_tokens: Sequence[int] | int | None = None
    pruning_layers: Sequence[int] | None = None
    version: str = "1.5"
    num_selected_heads: int = 14
    scale: float = 13.5
    bias: float = 0.0

    name = "sparsevlm"
    published = Published(environment={"RETAIN_TOKN": "visual_token_num"})
    reads_text = True

    def __post_init__(self):
        if isinstance(self.retained_tokens, int):
            self.visual_token_num, self.retained_tokens = self.retained_tokens, None
        self.check_budgets()
        self.version = str(self.version)
        check_choice("version", self.version, LAYERS)
        if self.num_selected_heads < 1:
            raise ValueError(f"num_selected_heads ({self.num_selected_heads}) must be at least 1")
        stages = len(self.pruning_layers or LAYERS[self.version])
        if self.version == "1.0":
            return
        if len(self.retained_tokens or RETAINED[self.version][64]) != stages:
            raise ValueError(
                f"retained_tokens ({self.retained_tokens}) and pruning_layers "
                f"({self.pruning_layers}) must have one entry per stage each"
            )

    @property
    def adaptive(self) -> bool:  # type: ignore[override] # of the setting, not of the class
        return self.version == "1.0"

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        super().check(num_patches, num_layers, crops)
        if self.retained_tokens is None and not self.adaptive:
            budget = self.tokens_of(num_patches * crops)
            check_budget(budget, num_patches, crops, shared=False)

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        return tuple(self.pruning_layers or scale_layers(LAYERS[self.version], num_layers))

    # --- how many -----------------------------------------------------------------------------

    def allowed(self, total: int) -> tuple[int, ...]:
        """Tokens left at each stage of an image of `total` tokens, merged ones not counted."""
        budget = self.tokens_of(total)
        given = self.retained_tokens
        wanted: Sequence[float]
        if given is not None and not isinstance(given, int):
            wanted = given
        elif budget >= total:
            return (total,) * len(RETAINED[self.version][64])
        else:
            published = RETAINED[self.version]
            table = {0: (0, 0, 0), **published, PATCHES: (PATCHES,) * 3}
            wanted = interpolate(table, budget * PATCHES / total)
        return tuple(max(1, int(number * total / PATCHES + 1e-6)) for number in wanted)

    def recycled(self, dropped: int) -> tuple[int, int]:
        """(tokens that are merged, tokens they become) of `dropped` ones."""
        if dropped <= 0 or self.version == "2.0":
            return 0, 0
        chosen = int(0.3 * dropped) + 1
        return chosen, chosen // 10 + 1

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        count = num_patches * crops
        plan = [count] * num_layers
        if self.adaptive:
            return plan
        for layer, kept in zip(self.stage_layers(num_layers), self.allowed(count), strict=True):
            if kept < plan[layer]:
                left = kept + self.recycled(plan[layer] - kept)[1]
                plan[layer + 1 :] = [left] * (num_layers - layer - 1)
        return plan

    # --- rating -------------------------------------------------------------------------------

    def probe(self, num_layers: int) -> Probe:
        return Probe(self.stage_layers(num_layers), self.ask)

    def ask(self, prefill: Prefill) -> Tensor:
        """Places (B, R) of the rating words, which are noted for the hook behind the layer."""
        prefill.state.asked = self.rater_rows(prefill)
        return prefill.state.asked[0]

    def rater_rows(self, prefill: Prefill) -> tuple[Tensor, Tensor]:
        """Places (B, R) of all rating words now, and (B, I, R) whether one rates an image."""
        state: SparseState = prefill.state
        if state.ahead is not None:
            ahead, weights = state.ahead
            return prefill.last[:, None] - ahead, weights
        raters, most = state.raters, state.most
        index = prefill.index.clamp(min=0)[:, None].expand(-1, raters.shape[1], -1)
        flags = raters.gather(2, index) & ~prefill.is_visual[:, None]
        if prefill.valid is not None:
            flags = flags & prefill.valid[:, None]
        last = torch.zeros_like(flags).scatter(
            2, prefill.last[:, None, None].expand(-1, flags.shape[1], 1), True
        )
        flags = torch.where(flags.any(dim=-1, keepdim=True), flags, last)
        rows, real = prefill.places(flags.any(dim=1), most)
        weights = flags.gather(2, rows[:, None].expand(-1, raters.shape[1], -1)) & real[:, None]
        if prefill.most_images == 1 and min(prefill.counts.behind) > 0:
            state.ahead = prefill.last[:, None] - rows, weights
        return rows, weights

    def score(self, attention: Tensor, weights: Tensor, own: Tensor) -> Tensor:
        """(B, S) rating of every token by the words of its image.

        attention (B, H, R, S); weights (B, I, R) who rates; own (B, I, S) which tokens they rate.
        """
        weights = weights.float() / weights.sum(dim=-1, keepdim=True).clamp(min=1)
        rated = torch.einsum("bir,bhrs->bihs", weights, attention) * own[:, :, None]
        if self.version == "2.0":
            heads = rated.sum(dim=-1)  # (B, I, H)
            best = top_stable(heads.flatten(0, 1), min(self.num_selected_heads, heads.shape[-1]))
            best = best.view(*heads.shape[:2], -1, 1).expand(-1, -1, -1, rated.shape[-1])
            rated = rated.gather(2, best)
        rated = rated.mean(dim=2)
        return rated[:, 0] if rated.shape[1] == 1 else rated.sum(dim=1)

    # --- stages -------------------------------------------------------------------------------

    def before_layer(self, index: int, prefill: Prefill) -> Prefill:
        if index == 0:
            counts = [list(row) for row in prefill.counts.images]
            prefill.state = SparseState(*find_raters(prefill), totals=counts, counts=counts)
        layers = self.stage_layers(len(prefill.decoder.layers))
        if index - 1 not in layers:
            return prefill
        stage, attention = layers.index(index - 1), prefill.recorded_rows
        rows, weights = prefill.state.asked
        own = prefill.own_tokens()
        if self.version == "2.0":
            attention = attention / nearness(prefill.decoder.rotary, prefill.position_ids, rows)
        score = self.score(attention, weights, own)
        state: SparseState = prefill.state
        counts = state.counts
        if self.version == "1.0":
            kept = self.kept_by_rank(attention.mean(dim=1), weights, own, counts)
        else:
            kept = [
                [min(count, self.allowed(total)[stage]) if count else 0 for count, total in pairs]
                for pairs in map(zip, counts, state.totals)
            ]
        if kept == counts:
            return prefill
        if self.version == "2.0":
            state.counts = kept
            return prefill.keep_visual(score, kept)
        return self.keep_and_merge(prefill, score, kept, counts)

    def kept_by_rank(self, rating: Tensor, weights: Tensor, own: Tensor, counts) -> list[list[int]]:
        """Version 1.0: tokens to keep of every image, from the rank of its ratings (B, R, S)."""
        block = rating[:, None] * weights[..., None] * own[:, :, None]  # (B, I, R, S)
        larger = torch.maximum(weights.sum(dim=-1), own.sum(dim=-1))
        rtol = larger * torch.finfo(block.dtype).eps
        ranks = torch.linalg.matrix_rank(block, atol=torch.zeros_like(rtol), rtol=rtol).tolist()
        return [
            [
                count
                if count < 2 or rank == count
                else max(1, min(int(rank * self.scale + self.bias), count - 1))
                for rank, count in zip(*pair, strict=True)
            ]
            for pair in zip(ranks, counts, strict=True)
        ]

    def keep_and_merge(self, prefill: Prefill, score: Tensor, kept, counts) -> Prefill:
        """The best tokens, then what the best of the others were merged into, then the text."""
        pairs = [
            [self.recycled(count - keep) for keep, count in zip(*row, strict=True)]
            for row in zip(kept, counts, strict=True)
        ]
        (batch, size), images, here = score.shape, len(pairs[0]), score.device
        staying, dropped = ranked(kept, counts, size)
        plan = [
            [(start, *pair) for start, pair in zip(*row, strict=True)]
            for row in zip(dropped, pairs, strict=True)
        ]
        start, num_source, num_merged = on_device(plan, here).unbind(dim=-1)  # (B, I) each
        most_source, most = (max(p[i] for row in pairs for p in row) for i in (0, 1))

        order = order_within_groups(score, prefill.visual_index)  # text, then image by image
        stays = on_device(staying, here, torch.bool)
        stays = torch.empty_like(stays).scatter_(1, order, stays)
        where = start[..., None] + torch.arange(most_source, device=here)
        where = order.gather(1, where.flatten(1).clamp(max=size - 1))
        tokens = gather_tokens(prefill.hidden_states, where).view(batch * images, most_source, -1)
        valid = torch.arange(most_source, device=here) < num_source.flatten()[:, None]
        merged = cluster(tokens, valid, num_merged.flatten().clamp(min=1), most)[2]

        owner = torch.arange(images, device=here).repeat_interleave(most).expand(batch, -1)
        real = torch.arange(most, device=here) < num_merged[..., None]
        prefill.state.counts = [
            [keep + new for keep, (_, new) in zip(*row, strict=True)]
            for row in zip(kept, pairs, strict=True)
        ]
        return prefill.keep_and_append(
            stays,
            merged.view(batch, images * most, -1),
            owner,
            real.flatten(1),
            renumber=True,
            counts=prefill.counts.with_images(prefill.state.counts),
        )


def order_within_groups(score: Tensor, group: Tensor) -> Tensor:
    """Places (B, S) of the tokens, group by group in ascending order, the best `score` (B, S) of a
    group first; equal scores stand in order of place. `group`: (B, S)."""
    by_score = score.argsort(dim=1, descending=True, stable=True)
    return by_score.gather(1, group.gather(1, by_score).argsort(dim=1, stable=True))


def ranked(kept, counts, size: int) -> tuple[list[list[bool]], list[list[int]]]:
    """Of rows of `size` tokens as `order_within_groups` puts them, text and padding first: whether
    each stays, and where the best of every image is that does not.

    kept, counts: tokens of every image (B, I) that stay, of so many
    """
    stays, starts = [], []
    for keeps, sizes in zip(kept, counts, strict=True):
        row, first = [True] * (size - sum(sizes)), []
        for keep, count in zip(keeps, sizes, strict=True):
            first.append(len(row) + keep)
            row += [True] * keep + [False] * (count - keep)
        stays.append(row)
        starts.append(first)
    return stays, starts


def find_raters(prefill: Prefill) -> tuple[Tensor, int]:
    """(B, I, S) the words that rate each image, and the most words a row has.

    A word after the image rates it when its share of the image's tokens, by inner product and
    softmax over the words, is above average.
    """
    images = prefill.most_images
    own, after = prefill.own_tokens(), prefill.text_behind()
    words, most = after.any(dim=1), max(1, *prefill.counts.behind)
    rows = true_first(words)[:, :most]
    x = prefill.hidden_states.float()
    product = x @ gather_tokens(x, rows).transpose(1, 2)  # (B, S, R)
    asked = after.gather(2, rows[:, None].expand(-1, images, -1))  # (B, I, R)
    image = prefill.visual_index.clamp(min=0)[..., None].expand(-1, -1, most)
    visible = asked.gather(1, image)  # (B, S, R)
    share = product.masked_fill(~visible, -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    rating = own.float() @ share / own.sum(dim=-1, keepdim=True).clamp(min=1)  # (B, I, R)
    mean = rating.sum(dim=-1, keepdim=True) / asked.sum(dim=-1, keepdim=True).clamp(min=1)
    chosen = asked & (rating > mean)
    chosen = torch.where(chosen.any(dim=-1, keepdim=True), chosen, asked)
    raters = torch.zeros_like(after).scatter(2, rows[:, None].expand(-1, images, -1), chosen)
    silent = (~raters.any(dim=-1)).any(dim=-1)  # of such an image, the last prompt token is asked
    return raters, int((raters.any(dim=1).sum(dim=1) + silent).amax())


def nearness(rotary, position_ids: Tensor, rows: Tensor) -> Tensor:
    """(B, 1, R, S) what RoPE alone makes of two vectors of ones, by their distance."""
    cos, sin = rotary(position_ids, torch.float32)  # (B, 1, S, d)
    index = rows[:, None, :, None].expand(-1, 1, -1, cos.shape[-1])
    pull = cos.gather(2, index) @ cos.transpose(2, 3) + sin.gather(2, index) @ sin.transpose(2, 3)
    pull = pull * cos.shape[-1] ** -0.5
    return torch.where(pull.abs() < 1e-9, 1e-9, pull)
