"""The base classes of pruning methods: what they have in common, and what the simple ones share.

Where a method acts, see `llava.pruning.stages`. Shapes use the letters of `llava.pruning.tokens`.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from .interfaces import LanguageModel
from .ops import on_device, scale_layer
from .prefill import Prefill
from .published import Published
from .stages import DecoderStage, Probe, VisionStage
from .tokens import VisionTokens

if TYPE_CHECKING:
    from typing_extensions import Self


class Pruner:
    """Base class of all methods, and the method called "none".

    An instance holds hyper-parameters, and, for learned methods, trained weights in `module`. Where
    it acts, it is a `VisionStage` or a `DecoderStage`, or both.
    """

    name: ClassVar[str] = "none"
    #: what an image keeps depends on its content: `token_schedule` is a bound, and
    #: `visual_token_num` the label of a published setting
    adaptive: ClassVar[bool] = False
    #: it chooses no tokens but has fewer by showing the tower smaller images: the control that says
    #: which questions of a benchmark are hard
    makes_images_smaller: ClassVar[bool] = False
    #: it works around another method, its option `base`: "wrapper+base"
    wraps: ClassVar[bool] = False
    #: the method runs without its trained part, which an option names
    part_is_optional: ClassVar[bool] = False
    #: what to set so that it does nothing inside the decoder; None: it acts there in any case
    before_decoder_by: ClassVar[str | None] = None
    #: option that methods of its kind take and this one does not -> why
    declines: ClassVar[dict[str, str]] = {}
    #: how the published programs of the method use it
    published: ClassVar[Published] = Published()
    #: whether `generate` returns what that of the release does
    as_published: bool = False
    #: trained weights, registered on the model the method is assigned to
    module: nn.Module | None = None

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        for stage in (VisionStage, DecoderStage):
            known = {name for name in vars(stage) if name[0] != "_" and not hasattr(Pruner, name)}
            if not issubclass(cls, stage) and (own := sorted(known & vars(cls).keys())):
                raise TypeError(
                    f"{cls.__name__} defines {', '.join(own)}, which nobody would read: write "
                    f"class {cls.__name__}({stage.__name__}, ...)"
                )

    @property
    def vision(self) -> VisionStage:
        """What acts before the decoder; a stage that does nothing where the method does not."""
        return self if isinstance(self, VisionStage) else NO_VISION_STAGE

    @property
    def decoder(self) -> DecoderStage:
        """What acts inside the decoder, likewise; a method whose setting decides whether anything
        does overrides this."""
        return self if isinstance(self, DecoderStage) else NO_DECODER_STAGE

    def attach(self, model: LanguageModel) -> None:
        """Called with the whole language model before anything else when the method is assigned.

        A method with trained weights builds and loads its `module` here, see
        `llava.pruning.learned`; it may read `model.config`, `model.model`, `model.lm_head` and
        `model.get_vision_tower()` (None: it has none). Raises ValueError where they do not fit.
        """

    def use_random_parts(self, model: LanguageModel) -> None:
        """Makes `module` of random weights that fit `model`, where the method has one, so that it
        is not loaded when the method is assigned: for measuring times, not for answers."""

    def part_folders(self, model_path: str) -> list[str]:
        """Folders, or files, of the trained parts that this method reads for the model of
        `model_path`."""
        return []

    def check_depth(self, num_layers: int) -> None:
        """Raises ValueError when this setting cannot run in a decoder of so many layers."""

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        """Raises ValueError when this setting cannot run on a model of that shape.

        num_patches: patches of one crop; crops: crops of an image (5 on LLaVA-NeXT, else 1).
        Called when the method is assigned to a model, so that errors come at load time; where
        images have grids of their own, `check_depth` is called then, and this for every image.
        """
        self.check_depth(num_layers)

    def with_budget_of(self, num_tokens: int, parts: int = 1) -> Self:
        """The method for images of `num_tokens` tokens: with a number in place of a share, and none
        above what they have.

        parts: pairs of frames of a video; a share is that of every pair, and at least one token,
               but inside the decoder one of the whole video
        """
        return self

    def for_part(self, parts: int) -> Self:
        """The method for one of the `parts` equal parts that share the budget of an image."""
        return self

    def for_crops(self, crops: int) -> Self:
        """The method with the same share of an image of `crops` crops: its number of tokens so many
        times."""
        return self

    def choosing(self, num_tokens: int) -> Pruner:
        """The method set to keep `num_tokens` tokens of an image as they are, and to blend none:
        what a wrapper asks of the method in it. Raises ValueError where it cannot."""
        raise ValueError(f"{self.name} cannot be asked for a number of tokens")

    @property
    def named(self) -> dict[str, Pruner]:
        """Name -> method, of all that this one consists of; options carry these names."""
        return {self.name: self}

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        """Visual tokens entering each decoder layer for one image of `crops` crops; where that
        depends on the image, the most it can be."""
        return [num_patches * crops] * num_layers

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


NO_VISION_STAGE, NO_DECODER_STAGE = VisionStage(), DecoderStage()


@dataclass(repr=False)
class ShareOption(Pruner):
    """Base of methods whose budget `visual_token_num` may be given as a share.

    visual_token_ratio: share of an image's tokens in place of `visual_token_num`, which is None
                        then; above 0 to 1, rounded (halves to even), at least one token. On
                        LLaVA-NeXT it is made a number once, that of an image of five crops
    """

    visual_token_num: int | None = None
    visual_token_ratio: float | None = field(default=None, kw_only=True)

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        # Set, or a dataclass would write one of its own.
        cls.__repr__ = cls.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        """The options, of the two budgets the one that counts."""
        values = {option.name: getattr(self, option.name) for option in fields(self) if option.repr}
        unset = ("visual_token_num", "visual_token_ratio")
        shown = (f"{k}={v!r}" for k, v in values.items() if v is not None or k not in unset)
        return f"{type(self).__name__}({', '.join(shown)})"

    def check_budgets(self) -> None:
        """Makes the share take the place of the default number. Raises ValueError on a share or a
        number that cannot be a budget, and on a share beside another number than the default."""
        share, number = self.visual_token_ratio, self.visual_token_num
        default = type(self).visual_token_num
        if share is None:
            if number is not default and (type(number) is not int or number < 1):
                raise ValueError(
                    f"visual_token_num ({number!r}) must be a whole number of at least 1 token"
                )
            return
        if isinstance(share, bool) or not 0 < share <= 1:
            raise ValueError(f"visual_token_ratio ({share!r}) must lie above 0 and up to 1")
        if number not in (None, default):
            raise ValueError(two_budgets(number, share))
        self.visual_token_num = None

    @property
    def has_budget(self) -> bool:
        """Whether either is given."""
        return self.visual_token_num is not None or self.visual_token_ratio is not None

    def tokens_of(self, num_tokens: int) -> int:
        """The budget of an image that has `num_tokens`; it may be more than those. Raises
        ValueError where there is none, see `has_budget`."""
        if (share := self.visual_token_ratio) is not None:
            return max(1, round(share * num_tokens))
        if self.visual_token_num is None:
            raise ValueError(f"{self.name} has no budget")
        return self.visual_token_num

    def with_budget_of(self, num_tokens: int, parts: int = 1) -> Self:
        if self.visual_token_ratio is not None:  # of every part, so that it is theirs exactly
            parts = parts if isinstance(self, VisionStage) else 1  # the decoder sees them as one
            part = num_tokens // parts
            return self._with_number(parts * max(1, min(self.tokens_of(part), part)))
        budget = self.visual_token_num
        if budget is None or budget <= num_tokens:
            return self
        return self._with_number(max(1, num_tokens))

    def for_part(self, parts: int) -> Self:
        number = self.visual_token_num
        if parts == 1 or number is None:
            return self
        return self._with_number(max(1, number // parts))

    def for_crops(self, crops: int) -> Self:
        number = self.visual_token_num
        return self if crops == 1 or number is None else self._with_number(crops * number)

    def choosing(self, num_tokens: int) -> Pruner:
        return self._with_number(num_tokens)

    def _with_number(self, visual_token_num: int) -> Self:
        own = copy(self)
        own.visual_token_num, own.visual_token_ratio = visual_token_num, None
        return own


def two_budgets(number: int, share: float) -> str:
    """What to say to someone who gives both."""
    return (
        f"visual_token_num ({number}) and visual_token_ratio ({share}) both say how many tokens to "
        "keep: give one of them"
    )


@dataclass
class BudgetPruner(ShareOption):
    """A method with a token budget."""

    visual_token_num: int = 64

    def __post_init__(self):
        self.check_budgets()

    def tokens_per_crop(self, crops: int) -> int:
        """The budget of one crop; `visual_token_num` is the sum over the crops of an image."""
        return self.visual_token_num // crops

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        super().check(num_patches, num_layers, crops)
        shared = isinstance(self, VisionStage)
        check_budget(self.tokens_of(num_patches * crops), num_patches, crops, shared)


def check_budget(visual_token_num: int, num_patches: int, crops: int, shared: bool = True) -> None:
    """Raises ValueError when the budget does not fit an image of `crops` crops; shared: the crops
    share it, so that each of them needs a token, and are not chosen from as a whole."""
    available = num_patches * crops
    if visual_token_num > available:
        where = "a crop" if crops == 1 else f"the {crops} crops of an image"
        raise ValueError(
            f"visual_token_num ({visual_token_num}) exceeds the {available} patches of {where}"
        )
    if shared and visual_token_num < crops:
        raise ValueError(
            f"visual_token_num ({visual_token_num}) leaves less than one token for each of the "
            f"{crops} crops of an image, or pairs of frames of a video"
        )


@dataclass
class SelectPruner(VisionStage, BudgetPruner):
    """Chooses patches between vision tower and projector; a method overrides `select` alone.

    visual_token_num: tokens per image; on LLaVA-NeXT the sum over its crops, shared out equally
    """

    def select(self, vision: VisionTokens) -> Tensor:
        """(B, T) places of the tokens to keep, T = `num_keep(vision)`, in any order."""
        raise NotImplementedError(f"{type(self).__name__} must define select()")

    def num_keep(self, vision: VisionTokens) -> int:
        """Tokens to keep of each crop."""
        return min(self.tokens_per_crop(vision.crops_in_budget), vision.features.shape[1])

    def candidates(self, vision: VisionTokens) -> VisionTokens:
        """The tokens that `select` may choose from, at least `num_keep` of each crop."""
        return vision

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        check_budget(self.visual_token_num, vision.features.shape[1], vision.crops_in_budget)
        vision = self.candidates(vision)
        return vision.keep(self.select(vision).sort(dim=1).values)

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        own = self.with_budget_of(num_patches * crops)
        return [min(own.tokens_per_crop(crops), num_patches) * crops] * num_layers


@dataclass
class WholeImages(SelectPruner):
    """Base of methods that choose from all crops of an image together, in a hook of their own
    (`after_projector`, `after_layouts`); here is how many they keep.

    visual_token_num: tokens per image, exactly
    """

    def num_tokens(self, available: int) -> int:
        """Tokens to keep of an image that has `available`."""
        return min(self.tokens_of(available), available)

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        return [self.num_tokens(num_patches * crops)] * num_layers


@dataclass
class EqualShares(SelectPruner):
    """Chooses patches of crops that share the budget of their image equally, however many they are;
    a method calls `keep_shares` where it acts and overrides `pick`.

    visual_token_num: tokens per image; on LLaVA-NeXT shared out among its crops, rounded down
    """

    anyres_config = {"mm_patch_merge_type": "spatial"}

    def pick(self, vision: VisionTokens, rows: Tensor | slice, count: int) -> Tensor:
        """(G, count) places of the tokens to keep of the crops `rows` (G,), in any order."""
        raise NotImplementedError(f"{type(self).__name__} must define pick()")

    def keep_shares(self, vision: VisionTokens) -> VisionTokens:
        shares = self.shares(vision)
        if len(shares) == 1:
            (count,) = shares
            return vision.keep(self.pick(vision, slice(None), count).sort(dim=1).values)
        kept = torch.zeros_like(vision.positions, dtype=torch.bool)
        counts = [0] * len(kept)
        for count, crops in shares.items():
            rows = on_device(crops, kept.device)
            places = self.pick(vision, rows, count)
            kept[rows] = torch.zeros_like(kept[rows]).scatter_(1, places, True)
            for crop in crops:
                counts[crop] = count
        return vision.keep_mask(kept, counts)

    def shares(self, vision: VisionTokens) -> dict[int, list[int]]:
        """Tokens of a crop -> the crops of images that have as many crops."""
        found: dict[int, list[int]] = {}
        for own in vision.crops_of_images():
            crops = range(own.start, own.stop)
            share = min(self.tokens_per_crop(len(crops)), vision.features.shape[1])
            found.setdefault(share, []).extend(crops)
        return found


@dataclass
class DecoderPruner(DecoderStage, BudgetPruner):
    """Drops visual tokens before one decoder layer; a method overrides `score` alone.

    visual_token_num: tokens per image that enter `layer` and the layers after it
    layer:            first decoder layer that sees fewer tokens (at least 1); None: `paper_layer`,
                      scaled to the depth of the decoder
    """

    layer: int | None = None

    reads_text = True
    #: `layer` of a 32-layer decoder when none is given
    paper_layer: ClassVar[int] = 2

    def __post_init__(self):
        super().__post_init__()
        if self.layer is not None and self.layer < 1:
            raise ValueError(f"layer ({self.layer}) must be at least 1: rows come from layer - 1")

    def cut_layer(self, num_layers: int) -> int:
        """`layer` in a decoder with `num_layers` layers."""
        return scale_layer(self.paper_layer, num_layers) if self.layer is None else self.layer

    def score(self, prefill: Prefill) -> Tensor:
        """(B, S) importance of every token; values on text are ignored."""
        return prefill.recorded_rows[:, :, -1].mean(dim=1)

    def check_depth(self, num_layers: int) -> None:
        layer = self.cut_layer(num_layers)
        if not 1 <= layer < num_layers:
            raise ValueError(
                f"layer ({layer}) must be at least 1 and below the {num_layers} decoder layers"
            )

    def probe(self, num_layers: int) -> Probe:
        return Probe((self.cut_layer(num_layers) - 1,))

    def before_layer(self, index: int, prefill: Prefill) -> Prefill:
        if index != self.cut_layer(len(prefill.decoder.layers)):
            return prefill
        return prefill.keep_visual(self.score(prefill), self.budgets(prefill))

    @property
    def by_share(self) -> bool:
        """Whether what an image keeps depends on how many tokens it has."""
        return self.visual_token_ratio is not None

    def left_of(self, count: int) -> int:
        """Tokens to keep of an image with `count`; it may be more than those."""
        return self.tokens_of(count)

    def budgets(self, prefill: Prefill) -> int | list[list[int]]:
        """Tokens to keep of every image, one number where it is the same for all."""
        if not self.by_share:
            return self.visual_token_num
        return [[self.left_of(count) for count in row] for row in prefill.counts.images]

    def reusable_layers(self, prefill: Prefill) -> int:
        num_layers = len(prefill.decoder.layers)
        return min(self.cut_layer(num_layers), *self.probe(num_layers).layers, num_layers)

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        dense, layer = num_patches * crops, self.cut_layer(num_layers)
        kept = min(self.left_of(dense), dense)
        return [dense] * layer + [kept] * (num_layers - layer)


def option_names(method: type[Pruner]) -> list[str]:
    """Names of the options a method takes."""
    return [f.name for f in fields(method) if f.init] if is_dataclass(method) else []
