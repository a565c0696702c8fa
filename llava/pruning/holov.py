"""HoloV: every run of the image gets a share of the budget and keeps what is looked at most in it.

Paper: Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention,
https://arxiv.org/abs/2510.02912

A run is so many tokens in raster order, one and a half rows of 24 with the 16 of the release, and
its share follows from the attention it gets, plus how much the similarities in it vary.

Differs from the release: the budget is an option (there, 64 is part of the code); what a run cannot
give goes to the others (there, embeddings of zeros fill the gap); batches, lists of images and any
number of tokens; one row of one layer is computed (there, the maps of all layers); no loops over
runs. The refetching of context that the paper describes is not in the release, nor here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import WholeImages
from .captured import captured
from .extras import with_extra, without_extra
from .ops import true_first
from .published import Published
from .sinks import SinkFilter
from .tokens import ImageTokens, VisionTokens, keep_chosen

#: the extra from one hook to the next: (B, N) the attention of a patch
ATTENTION = "attention"
#: runs of 576 tokens of which 64 stay
NUM_RUNS = 16
#: a sum of attention or of variances is never taken for less
LEAST = 1e-6


@dataclass
class HoloV(SinkFilter, WholeImages):
    """
    visual_token_num: tokens per image; on LLaVA-NeXT of the whole sequence of an image, newlines
                      left out
    num_runs:         runs that the tokens of an image are cut into; None: 16, as in the release,
                      and where images have grids of their own as many as keep the proportion of
                      16 runs to 64 of 576 tokens (1.78 x tokens / budget)
    alpha:            weight of how much similarities vary, against attention
    raster_order:     True puts kept tokens in the order of the image. False: as measured in the
                      paper, run by run, in a run by falling attention; where positions are places
                      in a picture they are in raster order anyway
    sink_ratio:       share of the patches left out, those of the largest norm; 0: none. Runs are
                      cut from the others
    """

    num_runs: int | None = None
    alpha: float = 0.09
    raster_order: bool = False

    name = "holov"
    needs = frozenset({"salience"})
    anyres_config = {"mm_patch_merge_type": "spatial_unpad"}
    published = Published(options={"num_patches": "num_runs"})

    def __post_init__(self):
        super().__post_init__()
        if self.num_runs is not None and self.num_runs < 1:
            raise ValueError(f"num_runs ({self.num_runs}) must be at least 1")
        if self.alpha < 0:
            raise ValueError(f"alpha ({self.alpha}) must be at least 0")
        self.in_raster_order = self.raster_order

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        """Tokens are compared in the space of the language model, sinks are known before it."""
        if vision.crops_in_budget > 1:
            return self.candidates_of_images(vision, self.visual_token_num)
        return self.candidates(vision)

    def after_projector(self, vision: VisionTokens) -> VisionTokens:
        """Images of a single crop, all at once; of others the attention is kept for later."""
        if vision.crops_in_budget > 1:
            return with_extra(vision, ATTENTION, vision.cue("salience"))
        own_grids = vision.block > 1
        return vision.keep(self.choose(vision.features, vision.cue("salience"), own_grids))

    def after_layouts(self, images: list[ImageTokens]) -> list[ImageTokens]:
        """Images of several crops."""

        def choose(alike: list[ImageTokens], count: int) -> Tensor:
            features = torch.stack([image.embeds for image in alike])
            return self.choose(features, torch.stack([image.extras[ATTENTION] for image in alike]))

        images = [without_newlines(im) if ATTENTION in im.extras else im for im in images]
        pruned = keep_chosen(images, [self.visual_token_num] * len(images), choose)
        return [without_extra(image, ATTENTION) for image in pruned]  # of no use to the decoder

    def choose(self, features: Tensor, attention: Tensor, own_grids: bool = False) -> Tensor:
        """(B, T) places of the tokens to keep, in their order in the prompt."""
        size = features.shape[1]
        count = min(self.visual_token_num, size)
        runs = self.num_runs
        if runs is None:
            runs = max(1, int(1024 / 576 * size / count)) if own_grids else NUM_RUNS
        chosen = best_of_runs(features, attention, count, runs, self.alpha)
        return chosen.sort(dim=1).values if self.raster_order or own_grids else chosen


def without_newlines(image: ImageTokens) -> ImageTokens:
    """Every grid behind the first one, the overview, has a newline at the end of each row."""
    newlines = sum(rows for rows, _ in image.blocks[1:])
    return image.keep(true_first(image.patches >= 0)[: len(image.patches) - newlines])


@captured
@torch.no_grad()
def best_of_runs(
    features: Tensor, attention: Tensor, count: int, num_runs: int, alpha: float
) -> Tensor:
    """Places (B, T) of features (B, N, C), run by run, in a run the most attended first; of a run
    that stays as a whole in raster order.

    attention: (B, N) fp32; count: T, at most N; alpha: as in `run_scores`
    """
    batch, size = attention.shape
    num_runs = min(num_runs, size)
    place, real = run_places(size, num_runs, attention.device)
    own = attention[:, place]  # (B, R, K)
    scores = run_scores(features[:, place], own, real, alpha)
    sizes = real.sum(dim=1).expand(batch, -1)
    quota = fitted(quotas(scores, count), sizes, scores, real.shape[1])
    whole = (quota == sizes)[..., None]
    own = own.masked_fill(~real, -torch.inf)
    order = own.argsort(dim=2, descending=True, stable=True)
    in_raster = torch.arange(order.shape[2], device=order.device)
    order = torch.where(whole, in_raster, order)
    kept = true_first((in_raster < quota[..., None]).flatten(1))[:, :count]
    return place.expand(batch, -1, -1).gather(2, order).flatten(1).gather(1, kept)


def run_places(size: int, num_runs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(places, which of them are there) of the tokens of every run, both (R, K), K the size of the
    longest. The first runs are one longer where `size` is no multiple of their number."""
    run = torch.arange(num_runs, device=device)[:, None]
    least, longer = divmod(size, num_runs)
    inside = torch.arange(least + (longer > 0), device=device)
    place = run * least + run.clamp(max=longer) + inside
    return place.clamp(max=size - 1), inside < least + (run < longer)


def run_scores(features: Tensor, attention: Tensor, real: Tensor, alpha: float) -> Tensor:
    """(B, R) what a run counts, from its features (B, R, K, C) and attention (B, R, K).

    Of a token it is its attention times 1000, plus `alpha` times the variance of its similarities,
    which are scaled so that over the run they weigh as much as attention; the mean over the run.
    real: (R, K) False where a run is shorter
    """
    sizes = real.sum(dim=1)
    unit = features.float()
    unit = unit / (unit.norm(dim=-1, keepdim=True) + LEAST) * real[..., None]
    similarity = unit @ unit.transpose(2, 3)  # (B, R, K, K)
    similarity.diagonal(dim1=2, dim2=3).zero_()
    others = (sizes - 1).clamp(min=1)[:, None]
    mean = similarity.sum(dim=3) / others
    # The zero of a token with itself counts as an entry, as released.
    distance = (similarity - mean[..., None]) * (real[:, None] & real[..., None])
    variance = distance.square().sum(dim=3) / others
    attention = 1000 * attention.float() * real
    level = attention.abs().sum(dim=2) / sizes
    spread = variance.sum(dim=2) / sizes
    varied = variance * (level / (spread + LEAST))[..., None]
    score = (attention + alpha * varied).sum(dim=2) / sizes
    return torch.where(sizes == 1, attention.sum(dim=2) / 1000, score)


def quotas(scores: Tensor, count: int) -> Tensor:
    """(B, R) `count` tokens shared out by `scores` (B, R), rounded down; the rest goes to the runs
    of the largest scores."""
    share = scores / (scores.sum(dim=1, keepdim=True) + LEAST)
    quota = (share * count).floor().long()
    rounds = -(-count // scores.shape[1])  # one, unless nothing has a score
    room = torch.full_like(quota, rounds)
    return quota + one_each(count - quota.sum(dim=1, keepdim=True), room, scores, rounds)


def fitted(quota: Tensor, sizes: Tensor, scores: Tensor, longest: int) -> Tensor:
    """Quotas (B, R) of which none exceeds the size (B, R) of its run, at most `longest`; what one
    cannot give goes to the others."""
    fits = torch.minimum(quota, sizes)
    surplus = (quota - fits).sum(dim=1, keepdim=True)
    return fits + one_each(surplus, sizes - fits, scores, longest)


def one_each(left: Tensor, room: Tensor, scores: Tensor, rounds: int) -> Tensor:
    """(B, R) what every run gets of `left` (B, 1) tokens that are given out one each, in every
    round to those of the largest `scores` (B, R) first that have `room` (B, R), at most `rounds`.
    """
    best = scores.argsort(dim=1, descending=True, stable=True)
    turn = torch.arange(rounds, device=room.device)[:, None]
    takes = room.gather(1, best)[:, None] > turn  # (B, rounds, R)
    gets = takes & (takes.flatten(1).cumsum(dim=1).view_as(takes) <= left[..., None])
    return torch.zeros_like(room).scatter(1, best, gets.sum(dim=1))
