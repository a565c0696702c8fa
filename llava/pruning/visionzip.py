"""VisionZip: the patches the class token attends to, plus a few tokens that merge all the others.

Paper: VisionZip: Longer is Better but Not Necessary in Vision Language Models,
https://arxiv.org/abs/2412.04467

Differs from the release: nothing is patched into other classes of the process; scores and keys
come from the layer the features come from (there, always layer 22 of 24); `contextual=0`, more
contextual tokens than patches and more dominant tokens than patches work (there, they raise); ties
go to the lower patch; sums are fp32; a budget of all patches leaves the image as it is (there, the
class token and a merged token would take the place of patches).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import Pruner, SelectPruner
from .captured import captured
from .ops import gather_tokens, normalize, top_stable, true_first
from .own_grids import OwnGrids
from .sinks import SinkFilter
from .tokens import MERGED, VisionTokens, without_cues


@dataclass
class VisionZip(SinkFilter, OwnGrids, SelectPruner):
    """
    visual_token_num: tokens per image, 27 dominant for 5 contextual ones (64 = 54 + 10); on
                      LLaVA-NeXT the sum over five crops, images with fewer crops have fewer tokens
    dominant:         tokens per crop kept as they are, the class token being the first of them
    contextual:       tokens per crop that merge the rest. Given together, these two replace
                      `visual_token_num` (191 and 30 are the release's defaults)
    sink_ratio:       share of the patches left out, those of the largest norm; 0: none
    """

    visual_token_num: int = 64
    dominant: int | None = None
    contextual: int | None = None

    name = "visionzip"
    needs = frozenset({"salience", "keys"})
    wants = frozenset({"cls_token"})
    anyres_config = {"mm_patch_merge_type": "spatial"}

    def __post_init__(self):
        super().__post_init__()
        if (self.dominant is None) != (self.contextual is None):
            raise ValueError(
                f"dominant ({self.dominant}) and contextual ({self.contextual}) go together: give "
                "both, or visual_token_num alone"
            )
        dominant, contextual = self.dominant, self.contextual
        if dominant is not None and contextual is not None and (dominant < 1 or contextual < 0):
            raise ValueError(
                f"dominant ({self.dominant}) must be at least 1, the class token, and contextual "
                f"({self.contextual}) at least 0"
            )

    def counts(self, num_patches: int, crops: int, classless: bool = False) -> tuple[int, int]:
        """(dominant patches, contextual tokens) of one crop; a class token comes on top of them.

        classless: the tower has none. As released for those, contextual tokens are a twentieth of
        all patches.
        """
        dominant, contextual = self.dominant, self.contextual
        if dominant is None or contextual is None:  # both, see `__post_init__`
            total = self.tokens_per_crop(crops)
            wanted = int(num_patches / 20) if classless else round(total * 5 / 32)
            contextual = min(max(1, wanted), total - 1)
            dominant = total - contextual
        patches = min(dominant - (not classless), num_patches)
        return patches, min(contextual, num_patches - patches)

    def choosing(self, num_tokens: int) -> Pruner:
        if self.dominant is not None:
            raise ValueError(
                f"{self.name} cannot be asked for a number of tokens beside dominant and contextual"
            )
        return Dominant(num_tokens, sink_ratio=self.sink_ratio)

    def num_keep(self, vision: VisionTokens) -> int:
        whole, classless = math.prod(vision.grid), vision.cls_token is None
        return sum(self.counts(whole, vision.crops_in_budget, classless))

    def keeps_all(self, num_patches: int, crops: int) -> bool:
        return self.dominant is None and self.tokens_per_crop(crops) >= num_patches

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        if self.dominant is None:
            super().check(num_patches, num_layers, crops)

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        size = vision.features.shape[1]
        if self.keeps_all(size, vision.crops_in_budget):
            return vision
        vision = self.candidates(vision)
        if vision.block > 1:
            return vision
        patches, targets, tokens = self.compress(vision)
        if not vision.complete:
            patches = vision.positions.gather(1, patches)
        batch, num_merged = targets.shape
        merged = size + torch.arange(num_merged, device=patches.device)
        first = patches.new_full((batch, 1), -1)
        positions = torch.cat([first, patches, merged.expand(batch, -1)], dim=1)
        tokens = torch.cat([vision.cue("cls_token"), tokens], dim=1)
        return replace(
            without_cues(vision),
            features=tokens,
            positions=positions,
            extras={MERGED: positions >= size},
        )

    def after_projector(self, vision: VisionTokens) -> VisionTokens:
        """Where blocks of patches become tokens here, those are merged, each at its target."""
        if vision.block == 1 or self.keeps_all(math.prod(vision.grid), vision.crops_in_budget):
            return vision
        patches, targets, tokens = self.compress(vision)
        positions = torch.cat([patches, targets], dim=1)
        if not vision.complete:
            positions = vision.positions.gather(1, positions)
        merged = torch.zeros_like(positions, dtype=torch.bool)
        merged[:, patches.shape[1] :] = True
        compressed = replace(
            without_cues(vision), features=tokens, positions=positions, extras={MERGED: merged}
        )
        return compressed.keep(positions.argsort(dim=1))

    def compress(self, vision: VisionTokens) -> tuple[Tensor, Tensor, Tensor]:
        """As `compress`, for the tokens as they are here."""
        keys = vision.cue("keys").float().unflatten(-1, (vision.num_heads, -1)).mean(dim=2)
        whole, classless = math.prod(vision.grid), vision.cls_token is None
        counts = self.counts(whole, vision.crops_in_budget, classless)
        return compress(vision.features, vision.cue("salience"), keys, *counts)

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        own = self.with_budget_of(num_patches * crops)
        if own.keeps_all(num_patches, crops):
            return [num_patches * crops] * num_layers
        kept = sum(own.counts(num_patches, crops, self.own_grids)) + (not self.own_grids)
        return [kept * crops] * num_layers


@dataclass
class Dominant(SinkFilter, SelectPruner):
    """The patches with the most attention alone, for a wrapper that merges the others.

    visual_token_num: as in `SelectPruner`
    """

    name = VisionZip.name
    needs = frozenset({"salience"})
    anyres_config = VisionZip.anyres_config

    def select(self, vision: VisionTokens) -> Tensor:
        return top_stable(vision.cue("salience"), self.num_keep(vision))


@captured
def compress(
    features: Tensor, score: Tensor, keys: Tensor, dominant: int, contextual: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(patches kept (B, dominant), patches others are merged into (B, contextual), tokens (B,
    dominant + contextual, C)) of features (B, N, C).

    score: (B, N), the highest ones are dominant; keys: (B, N, d), what the rest is matched by.
    A contextual token is its target plus the mean of what was assigned to it.
    """
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen.scatter_(1, top_stable(score, dominant), True)
    order = true_first(chosen)
    patches, rest = order[:, :dominant], order[:, dominant:]  # both in raster order
    kept = gather_tokens(features, patches)
    if contextual == 0:
        return patches, patches[:, :0], kept
    is_target, nearest = assign(gather_tokens(keys, rest), contextual)
    wide = gather_tokens(features, rest).float()
    weight = (~is_target).to(wide.dtype).expand(len(wide), -1)  # targets are assigned to nothing
    count = wide.new_zeros(len(wide), contextual).scatter_add_(1, nearest, weight)
    places = nearest[..., None].expand_as(wide)
    total = torch.zeros_like(wide[:, :contextual]).scatter_add_(1, places, wide * weight[..., None])
    targets = target_places(rest.shape[1], contextual)
    merged = wide[:, targets] + total / count.clamp(min=1)[..., None]
    return patches, rest[:, targets], torch.cat([kept, merged.to(features.dtype)], dim=1)


def target_places(num_rest: int, contextual: int) -> slice:
    """Every `step`-th of the remaining patches, the first `contextual` of them."""
    step = max(1, num_rest // contextual)
    return slice(0, step * contextual, step)


def assign(keys: Tensor, contextual: int) -> tuple[Tensor, Tensor]:
    """(which places are targets (M,), number of the target nearest to each place (B, M)) for the
    keys (B, M, d) of the remaining patches; equally near targets: the first."""
    targets = target_places(keys.shape[1], contextual)
    is_target = torch.zeros(keys.shape[1], dtype=torch.bool, device=keys.device)
    is_target[targets] = True
    unit = normalize(keys)
    return is_target, (unit @ unit[:, targets].transpose(1, 2)).argmax(dim=2)


def visionzip(model, dominant: int = 191, contextual: int = 30):
    """The entry point of the release: puts the method on a loaded model and returns the model."""
    model.pruner = VisionZip(dominant=dominant, contextual=contextual)
    return model
