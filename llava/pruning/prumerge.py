"""PruMerge: patches whose class-token attention is an outlier, each with its nearest neighbours.

Every kept patch adds up what its most similar patches carry, weighted by their attention; one more
token holds the sum of all that was not kept. PruMerge+ also keeps patches at regular intervals. The
tokens are in the order of their attention, not of the image.

Paper: LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models,
https://arxiv.org/abs/2403.15388

Differs from the release: every image has its own number of tokens (there, one for the whole batch,
and PruMerge+ runs on single images only); an image without outliers keeps its most attended patch
(there, an error or nothing); with a fixed ratio PruMerge+ keeps no patch twice; all centres are
merged at once (there, two Python loops); `visual_token_num` fixes the total, which the release
cannot. LLaVA-1.5 only, as in the paper.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Pruner, check_budget
from .counts import Known
from .ops import gather_tokens, lookup, normalize, ranks
from .sinks import SinkFilter, check_sink_ratio
from .stages import VisionStage
from .tokens import MERGED, VisionTokens


@dataclass
class PruMerge(SinkFilter, VisionStage, Pruner):
    """
    visual_token_num: tokens per image, the one for the rest included; None: as many as there are
                      outliers, or as `reduction_ratio` says
    plus:             also keep patches at regular intervals (PruMerge+)
    reduction_ratio:  share of the patches that are kept for their attention, above 0 to 1 (trained
                      checkpoints: 1/8); None: the share of outliers in each image
    outlier_factor:   an outlier lies this many interquartile ranges above the third quartile;
                      larger keeps fewer
    neighbors:        patches merged into each kept one
    sink_ratio:       share of the patches left out, those of the largest norm; 0: none. They are no
                      outliers, are merged into nothing, and are missing in the one for the rest
    """

    visual_token_num: int | None = None
    plus: bool = False
    reduction_ratio: float | None = None
    outlier_factor: float = 1.5
    neighbors: int = 32

    name = "prumerge"
    blends = True
    anyres = False

    @property
    def adaptive(self) -> bool:  # type: ignore[override] # of the setting, not of the class
        return self.visual_token_num is None

    def __post_init__(self):
        budget, ratio = self.visual_token_num, self.reduction_ratio
        check_sink_ratio(self.sink_ratio)
        if budget is not None and (isinstance(budget, bool) or budget != int(budget) or budget < 1):
            raise ValueError(
                f"visual_token_num ({budget!r}) must be a whole number of at least 1 token"
            )
        if ratio is not None and not 0 < ratio <= 1:
            raise ValueError(f"reduction_ratio ({ratio}) must lie above 0 and be at most 1")
        if budget is not None and (self.plus or ratio is not None):
            raise ValueError("visual_token_num excludes plus and reduction_ratio: choose one")
        if self.neighbors < 0:
            raise ValueError(f"neighbors ({self.neighbors}) must be at least 0")

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        if self.visual_token_num is not None:
            check_budget(self.visual_token_num, num_patches, crops)

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        most = num_patches + 1  # all of them, and the one for the rest
        if not self.plus and self.outlier_factor >= 0:
            most = num_patches // 4 + 1  # a quarter is above a quartile
        if self.visual_token_num is not None:
            most = self.visual_token_num
        elif self.reduction_ratio is not None and not self.plus:
            most = min(max(1, int(num_patches * self.reduction_ratio)) + 1, num_patches + 1)
        return [most] * num_layers

    def tower_extras(self, num_layers: int, selected: int) -> dict[int, frozenset[str]]:
        return {num_layers - 1: frozenset({"keys", "cls_key", "cls_query"})}

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        num_patches = vision.features.shape[1]
        if self.visual_token_num is not None and self.visual_token_num >= num_patches:
            return vision
        last = vision.layers[max(vision.layers)]
        keys = last["keys"]
        attention = class_attention(last["cls_query"], last["cls_key"], keys)
        left = self.candidates(vision, self.least(num_patches))
        if left is not vision:
            keys = gather_tokens(keys, left.positions)
            attention = attention.gather(1, left.positions)
        centers, valid, counts = self.centers(attention, num_patches)
        tokens = self.merge(left.features.float(), keys, attention, centers, valid)
        rest = centers.new_full((len(centers), 1), num_patches)
        centers = centers if left is vision else left.positions.gather(1, centers)
        positions = torch.cat([centers, rest], dim=1)
        valid = torch.cat([valid, torch.ones_like(rest, dtype=torch.bool)], dim=1)
        return replace(
            vision,
            features=tokens.to(vision.features.dtype),
            positions=positions,
            valid=valid,
            known=Known((valid,), [count + 1 for count in counts]),
            extras={MERGED: torch.ones_like(positions, dtype=torch.bool)},
            layers={},
        )

    def least(self, num_patches: int) -> int:
        """Patches of a crop that must not be left out, so that the number asked for is there."""
        if self.visual_token_num is not None:
            return max(1, self.visual_token_num - 1)
        return max(1, int(num_patches * (self.reduction_ratio or 0)))

    def centers(
        self, attention: Tensor, num_patches: int | None = None
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Patches to keep (B, M) by falling attention (B, N), then those at regular intervals;
        (B, M) False on padding; and how many they are of each crop.

        num_patches: of a crop, those that are left out included; None: none are
        """
        size = attention.shape[1]
        number, start, step = self.counts(attention, num_patches or size)
        patch = torch.arange(size, device=attention.device)
        rank = ranks(attention)
        top = rank < number
        key = torch.where(top, rank, 3 * size)
        if self.plus:
            regular = (patch >= start) & ((patch - start) % step == 0) & (patch < size - 1)
            key = torch.where(regular & ~top, size + patch, key)
        counts = (key < 3 * size).sum(dim=1).tolist()
        order = key.argsort(dim=1, stable=True)[:, : max(counts)]
        return order, key.gather(1, order) < 3 * size, counts

    def counts(self, attention: Tensor, num_patches: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 1) each: patches kept for their attention, first of those at regular intervals, and
        the interval."""
        size = attention.shape[1]
        if self.visual_token_num is not None:
            number = torch.full_like(attention[:, :1], self.visual_token_num - 1).long()
            return number, number, number
        if (share := self.reduction_ratio) is not None:
            number = torch.full_like(attention[:, :1], max(1, int(num_patches * share))).long()
            interval = torch.full_like(number, int(1 / max(share, 1 / size)))
            return number, interval // 2, interval
        low, high = attention.quantile(torch.tensor([0.25, 0.75]).to(attention), dim=1)
        bound = high + self.outlier_factor * (high - low)
        outliers = (attention > bound[:, None]).sum(dim=1, keepdim=True)
        number = lookup(num_outliers, outliers, size, size)
        interval = lookup(outlier_interval, outliers, size, size)
        return number, torch.zeros_like(number), (interval // 3).clamp(min=1)

    def merge(
        self, features: Tensor, keys: Tensor, attention: Tensor, centers: Tensor, valid: Tensor
    ) -> Tensor:
        """Tokens (B, M + 1, C): every centre with its neighbours, and the sum of the rest."""
        unit = normalize(keys)
        own = centers[..., None]
        similar = gather_tokens(unit, centers) @ unit.transpose(1, 2)  # (B, M, N)
        similar = similar.scatter(2, own, -torch.inf)
        count = min(self.neighbors, features.shape[1] - 1)
        nearest = similar.argsort(dim=2, descending=True, stable=True)[..., :count]
        near = torch.zeros_like(similar).scatter_(2, nearest, 1.0)
        weight = (near * attention[:, None]).scatter(2, own, 1.0)
        kept = torch.zeros_like(attention).scatter_add_(1, centers, valid.to(attention.dtype))
        rest = attention * (kept == 0)
        return torch.cat([weight, rest[:, None]], dim=1) @ features


def num_outliers(outliers: int, size: int) -> int:
    """Patches kept of `size` with so many outliers: the release goes by their share, rounded."""
    return max(1, int(size * (outliers / size)))


def outlier_interval(outliers: int, size: int) -> int:
    """Every which patch makes as many as there are outliers, at least one."""
    return int(1 / max(outliers / size, 1 / size))


def class_attention(query: Tensor, cls_key: Tensor, keys: Tensor) -> Tensor:
    """(B, N) share of the class token's attention, all heads as one; query and cls_key (B, C) of
    the class token, keys (B, N, C) of the patches."""
    every = torch.cat([cls_key[:, None], keys], dim=1).float()
    scores = (every @ query.float()[..., None])[..., 0] * query.shape[1] ** -0.5
    return scores.softmax(dim=1)[:, 1:]
