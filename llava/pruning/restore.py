"""RESTORE: half of the budget is chosen by another method, the other half are merged tokens.

Paper: RESTORE, https://arxiv.org/abs/2606.01711

A wrapper around methods that act before the decoder: `restore+vispruner`. What the other method
does not choose is merged into as many tokens as it chose. All keep places in the unpruned image (a
merged one the middle place of its group), and attention gives back what thinned-out tokens lost: in
every layer a query adds ln(s (c - D)) to its product with a key of s tokens, D being how much the
rotation of positions alone makes of the distance between both.

Written from the paper; the code was not looked at. Where the text leaves a choice:
- density and what is denser are over all tokens of a crop, of equal density the earlier one is
  denser; centres of groups are not among the chosen;
- the bias holds for all queries and keys, text included, and for the answer (`calibrate_decode`);
- merging stays within a crop of LLaVA-NeXT, but a method that chooses from the whole sequence of an
  image (divprune there) leaves the rest of that sequence to be merged;
- a prompt none of whose images lost a token is left as it is, without a bias;
- a method that merges as well is asked for the patches that it keeps as they are (of visionzip the
  dominant ones), as merging is done here. One that keeps none (pool, prumerge) is refused;
- methods that act inside the decoder are refused. The paper wraps some "stage by stage" and has
  numbers for that, but does not say which states are compared and averaged there, whether sizes of
  groups add up from cut to cut, or what bias the layers before a cut have: whatever was built would
  not be what was measured. They may follow a wrapped method instead (restore+vispruner+fastv).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import BudgetPruner, Pruner, ShareOption, check_budget
from .counts import Known, counted
from .density_merge import Merged, merge
from .extras import with_extra, without_extra
from .fastervlm import FasterVLM
from .interfaces import LanguageModel
from .ops import gather_tokens, on_device, shared_out
from .position_bias import PositionBias
from .stages import DecoderStage, VisionStage, fills
from .tokens import KEY_BIAS, MERGED, ImageTokens, VisionTokens, without_cues

#: the extra, on the way to the sequences of images, that is True on tokens that the base method
#: leaves out before it chooses: they are merged like all others that it does not choose
LEFT_OUT = "restore_left_out"
#: what a wrapper says of its vision stage as the method in it does
AS_THE_BASE = (
    "needs",
    "wants",
    "does_without",
    "merges_blocks",
    "reads_question",
    "anyres",
    "anyres_tiles",
    "anyres_config",
)


@dataclass(frozen=True)
class Calibration(PositionBias):
    """ln(c - D), D being the closeness of two positions: 0 for a token and itself where c is 2."""

    c: float = 2.0

    def __call__(self, closeness: Tensor) -> Tensor:
        return (self.c - closeness.clamp(max=1.0)).log()


@dataclass
class Undecided(VisionTokens):
    """All tokens of the crops, with what the method in the wrapper made of them in vision space.

    chosen: None where no method is asked
    """

    chosen: VisionTokens | None = None


@dataclass
class Restore(VisionStage, BudgetPruner):
    """
    visual_token_num: tokens per image, chosen and merged ones together; on LLaVA-NeXT the sum over
                      its crops, shared out as the base method does
    base:             the method that chooses; its own budget is left to the wrapper
    gamma:            share of the budget that the base method chooses, 0 to 1; 1: nothing is
                      merged, the rest is dropped (better where text is read); 0: all is merged
    c:                attention adds ln(c - D), above 1; larger gives distant tokens less of an
                      advantage over near ones
    calibrate_decode: whether tokens of the answer add it, too; False: they add ln(s) alone
    pruned_size:      where nothing is merged a token counts for "one", or for all tokens of the
                      image divided by those that stay ("uniform")
    """

    visual_token_num: int = 64
    base: Pruner = field(default_factory=FasterVLM)
    gamma: float = 0.5
    c: float = 2.0
    calibrate_decode: bool = True
    pruned_size: str = "one"

    name = "restore"
    wraps = True
    position_policy = "grid"
    biases_attention = True

    SIZES: ClassVar[tuple[str, ...]] = ("one", "uniform")

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.gamma, bool) or not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma ({self.gamma!r}) must lie from 0 to 1")
        if isinstance(self.c, bool) or not self.c > 1:
            raise ValueError(f"c ({self.c!r}) must be above 1: attention adds ln(c - D), D up to 1")
        if self.pruned_size not in self.SIZES:
            raise ValueError(
                f"pruned_size {self.pruned_size!r} is unknown, choose from {', '.join(self.SIZES)}"
            )
        check_base(type(self).name, self.base)
        self.name = f"{type(self).name}+{self.base.name}"  # type: ignore[misc] # of this one
        self.part_folders = self.base.part_folders  # type: ignore[method-assign] # likewise
        for name in AS_THE_BASE:
            setattr(self, name, getattr(self.base.vision, name))

    # --- the method in it -----------------------------------------------------------------------

    @property
    def named(self) -> dict[str, Pruner]:
        return {type(self).name: self, **self.base.named}

    @property
    def module(self) -> nn.Module | None:  # type: ignore[override] # is never set here
        return self.base.module

    def attach(self, model: LanguageModel) -> None:
        self.base.attach(model)

    def use_random_parts(self, model: LanguageModel) -> None:
        self.base.use_random_parts(model)

    def tower_extras(self, num_layers: int, selected: int) -> dict[int, frozenset[str]]:
        return self.base.vision.tower_extras(num_layers, selected)

    # --- budgets --------------------------------------------------------------------------------

    def split(self, budget: int) -> tuple[int, int]:
        """(tokens that the base method chooses, merged tokens) of a budget."""
        chosen = int(self.gamma * budget + 0.5)
        return chosen, budget - chosen

    def on_sequences(self, crops: int) -> bool:
        """Whether the base method chooses from the finished sequences of images of several crops,
        so that a budget is that of an image, not of a crop."""
        hooks = "after_layout", "after_layouts"
        return crops > 1 and fills(type(self.base.vision), VisionStage, *hooks)

    def chooser(self, crops: int) -> Pruner | None:
        """The base method with its part of the budget of an image; None: it has none."""
        if self.on_sequences(crops):
            asked = self.split(self.visual_token_num)[0]
        else:
            asked = self.split(self.tokens_per_crop(crops))[0] * crops
        return self.base.choosing(asked) if asked else None

    def check_depth(self, num_layers: int) -> None:
        self.base.check_depth(num_layers)

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        super().check(num_patches, num_layers, crops)
        own, total = self.with_budget_of(num_patches * crops), num_patches * crops
        base = own.chooser(crops)
        if base is None or own.token_schedule(num_patches, 1, crops)[0] == total:
            return
        asked = base.visual_token_num  # type: ignore[attr-defined] # `choosing` set it
        try:
            base.check(num_patches, num_layers, crops)
        except ValueError as error:
            raise ValueError(
                f"{self.base.name}, which chooses {asked} of {own.visual_token_num} tokens: {error}"
            ) from error
        if (found := base.token_schedule(num_patches, 1, crops)[0]) != asked:
            raise ValueError(
                f"{self.base.name} keeps {found} tokens where {type(self).name} asks it for "
                f"{asked}: leave out what sets its number of tokens, which is the wrapper's"
            )

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        own = self.with_budget_of(num_patches * crops)
        if self.on_sequences(crops):
            return [min(own.visual_token_num, num_patches * crops)] * num_layers
        return [min(own.tokens_per_crop(crops), num_patches) * crops] * num_layers

    # --- hooks ----------------------------------------------------------------------------------

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        """Notes what the base method makes of the tokens, which all stay for now."""
        size, crops = vision.features.shape[1], vision.crops_in_budget
        check_budget(self.visual_token_num, size, crops)
        base = self.chooser(crops)
        if self.on_sequences(crops):
            return vision if base is None else marked(vision, base.vision.after_encoder(vision))
        if self.tokens_per_crop(crops) >= size:
            return vision
        chosen = None
        if base is not None:
            chosen = base.vision.after_encoder(replace(vision, extras={**vision.extras}))
        return Undecided(**{f.name: getattr(vision, f.name) for f in fields(vision)}, chosen=chosen)

    def after_projector(self, vision: VisionTokens) -> VisionTokens:
        crops = vision.crops_in_budget
        base = self.chooser(crops)
        if not isinstance(vision, Undecided):
            if base is None or not self.on_sequences(crops):
                return vision
            return base.vision.after_projector(vision)
        kept, counts = self.chosen_places(vision, base)
        groups: dict[tuple[int, int], list[int]] = {}  # crops by their chosen and merged tokens
        for crop, pair in enumerate(zip(counts, self.beside(vision, counts), strict=True)):
            groups.setdefault(pair, []).append(crop)
        parts = []
        for (count, beside), members in groups.items():
            own = slice(None) if len(groups) == 1 else on_device(members, kept.device)
            parts.append((members, self.merged(vision.features[own], kept[own, :count], beside)))
        return with_tokens(vision, parts)

    def beside(self, vision: VisionTokens, counts: list[int]) -> list[int]:
        """Merged tokens of every crop, of which `counts` are chosen. An image has as many of them
        for one that is chosen as the budget says, each crop by what is chosen of it: the base
        method may give crops different numbers, and more where there are fewer crops."""
        size, found = vision.features.shape[1], []
        asked, merged = self.split(self.tokens_per_crop(vision.crops_in_budget))
        for crops in vision.crops_of_images():
            own = counts[crops]
            total = sum(own) * merged // asked if asked else len(own) * merged
            found += shared_out(own, [size - count for count in own], total)
        return found

    def chosen_places(self, vision: Undecided, base: Pruner | None) -> tuple[Tensor, list[int]]:
        """(B, K) places that the base method chooses, those of a crop first, and how many they are
        of each crop."""
        chosen = vision.chosen
        if base is None or chosen is None:
            return vision.positions[:, :0], [0] * len(vision.positions)
        features = gather_tokens(vision.features, chosen.positions)
        chosen = replace(chosen, features=features, project=vision.project)
        chosen = base.vision.after_projector(chosen)
        if MERGED in chosen.extras:
            raise ValueError(f"{base.name} {BLENDS.format(wrapper=type(self).name)}")
        return chosen.positions, chosen.crop_counts()

    def after_layouts(self, images: list[ImageTokens]) -> list[ImageTokens]:
        """Finished sequences are merged where the base method chooses from them; what tokens of
        the prompt add to attention is left with the images that lost tokens."""
        whole = [number for number, image in enumerate(images) if self.is_whole(image)]
        if whole:
            asked, merged = self.split(self.visual_token_num)
            sequences = [images[number] for number in whole]
            chosen = [image.keep(slice(0)) for image in sequences]
            if asked:
                offered = [without_marked(image) for image in sequences]
                chosen = self.base.choosing(asked).vision.after_layouts(offered)
            images = list(images)
            for number, image, own in zip(whole, sequences, chosen, strict=True):
                kept = torch.searchsorted(image.offsets, own.offsets)
                images[number] = with_merged(
                    image, self.merged(image.embeds[None], kept[None], merged)
                )
        calibration = Calibration(self.calibrate_decode, self.c)
        images = [without_extra(image, LEFT_OUT) for image in images]
        return [
            replace(image, position_bias=calibration) if KEY_BIAS in image.extras else image
            for image in images
        ]

    def is_whole(self, image: ImageTokens) -> bool:
        """Whether the sequence of an image is still to be cut."""
        size = len(image.embeds)
        return self.on_sequences(2) and self.visual_token_num < size == image.length

    def merged(self, features: Tensor, kept: Tensor, count: int) -> Merged:
        """The tokens at `kept` (B, K) of (B, N, D), and `count` groups of the others."""
        size = 1.0
        if not count and self.pruned_size == "uniform":
            size = features.shape[1] / kept.shape[1]
        return Merged(*merge(features, kept, count, size))


BLENDS = "blends the tokens it leaves, so that there is no patch that {wrapper} could keep as it is"


def check_base(wrapper: str, base: Pruner) -> None:
    """Raises ValueError where `wrapper` cannot work around a method."""
    if not isinstance(base, Pruner):
        raise ValueError(
            f"base ({base!r}) must be a pruning method, as build_pruner makes them; by name it is "
            f"build_pruner('{wrapper}+METHOD')"
        )
    name, stage = base.name, base.vision
    before = "before_tower", "before_tower_layer"
    if base.wraps:
        reason = "is a wrapper itself"
    elif type(base.decoder) is not DecoderStage:
        reason = f"chooses inside the decoder, where {wrapper} cannot merge what is not chosen"
        if base.before_decoder_by is not None and can_be_asked(base):
            reason += f": set {name}_{base.before_decoder_by}"
        elif not isinstance(base, VisionStage):
            reason += f": let it follow another method, {wrapper}+METHOD+{name}"
    elif not isinstance(base, VisionStage):
        reason = "chooses no tokens"
    elif fills(type(stage), VisionStage, *before):
        reason = f"changes what the vision tower sees, so that nothing is left for {wrapper}"
    elif stage.blends:
        reason = BLENDS.format(wrapper=wrapper)
    elif base.adaptive or not isinstance(base, ShareOption):
        reason = "cannot be asked for a number of tokens"
    elif (base.visual_token_num, base.visual_token_ratio) != (type(base).visual_token_num, None):
        reason = f"has a budget of its own, {base}: give the budget to {wrapper}"
    else:
        base.choosing(1)  # says so where its options leave no room for a budget
        return
    raise ValueError(f"{wrapper} cannot work around {name}, which {reason}")


def can_be_asked(base: Pruner) -> bool:
    """Whether a method can choose a number of tokens before the decoder."""
    try:
        base.choosing(1)
    except ValueError:
        return False
    return True


# --- tokens that are not offered to the base method ----------------------------------------------


def marked(vision: VisionTokens, left: VisionTokens) -> VisionTokens:
    """`left`, what the base method made of `vision`; where it is without some of the tokens these,
    too, with the mark `LEFT_OUT`."""
    if left.positions is vision.positions:
        return left
    there = torch.ones_like(left.positions, dtype=torch.bool) if left.valid is None else left.valid
    missing = torch.ones_like(vision.positions, dtype=torch.bool)
    return with_extra(vision, LEFT_OUT, missing.scatter(1, left.positions, ~there))


def without_marked(image: ImageTokens) -> ImageTokens:
    """The sequence of an image as the base method would have it."""
    if (missing := image.extras.get(LEFT_OUT)) is None:
        return image
    return without_extra(image.keep(~missing), LEFT_OUT)


# --- tokens that were merged ----------------------------------------------------------------------


def with_tokens(vision: Undecided, parts: list[tuple[list[int], Merged]]) -> VisionTokens:
    """`vision` with these tokens of its crops: (crops, their tokens); crops of fewer tokens are
    padded on the right."""
    whole, valid, known = parts[0][1], None, None
    if len(parts) > 1:
        device, batch = whole.places.device, len(vision.features)
        counts = [0] * batch
        for crops, part in parts:
            for crop in crops:
                counts[crop] = part.places.shape[1]
        most = max(counts)
        whole = Merged(*(x.new_zeros(batch, most, *x.shape[2:]) for x in whole))
        for crops, part in parts:
            rows = on_device(crops, device)
            for there, here in zip(whole, part, strict=True):
                there[rows, : here.shape[1]] = here
        valid = torch.arange(most, device=device) < on_device(counts, device)[:, None]
        valid = counted(valid)
        known = Known((valid,), counts)
    made = without_cues(
        VisionTokens(**{f.name: getattr(vision, f.name) for f in fields(VisionTokens)})
    )
    return replace(
        made,
        features=whole.embeds,
        positions=whole.places,
        valid=valid,
        known=known,
        layers={},
        extras={MERGED: whole.blended, KEY_BIAS: whole.sizes.clamp(min=1).log()},
    )


def with_merged(image: ImageTokens, tokens: Merged) -> ImageTokens:
    """The sequence of an image with these tokens of it, a batch of one."""
    places, embeds, sizes, blended = (x[0] for x in tokens)
    kept = image.keep(places)
    patches = kept.patches.masked_fill(blended, -1)
    return replace(kept, embeds=embeds, patches=patches, extras={KEY_BIAS: sizes.log()})
