"""The base classes of pruning methods: hooks, budgets, and what can be settled for all of them.

Shapes use the letters of `llava.pruning.tokens`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import ClassVar

from torch import Tensor, nn

from .drafter import Drafter
from .ops import on_device, scale_layer
from .prefill import Prefill
from .tokens import ImageTokens, TowerTokens, VisionTokens


class Pruner:
    """Base class, and the method called "none": every hook is the identity.

    An instance holds hyper-parameters (and, for learned methods, trained weights in `module`).
    Whatever belongs to one image or prompt travels in `VisionTokens` and `Prefill`, so that one
    instance serves any number of requests.
    """

    name: ClassVar[str] = "none"
    #: extras wanted from the selected layer of the vision tower: "cls_attention", "keys",
    #: "cls_token", and "fingerprint" of the pixels
    needs: ClassVar[frozenset[str]] = frozenset()
    #: "sequence": kept visual tokens are counted 0, 1, 2, ...; "grid": they stay where the unpruned
    #: image would have put them, and the text after the image stays where it was
    position_policy: ClassVar[str] = "sequence"
    #: LLaVA-NeXT: tiles (across, down) every image is cut into, without newlines and unpadding;
    #: None: the resolutions and the layout the checkpoint was trained with
    anyres_tiles: ClassVar[tuple[int, int] | None] = None
    #: LLaVA-NeXT: values that replace those of the config while the method is in use, for example
    #: {"mm_patch_merge_type": "spatial"}
    anyres_config: ClassVar[dict] = {}
    #: the choice reads tokens behind the image: running prompt and answer again from the start, as
    #: `use_cache=False` does at every step, may choose other tokens
    reads_text: ClassVar[bool] = False
    #: a hook before the decoder reads `VisionTokens.questions`; other methods are not given them
    reads_question: ClassVar[bool] = False
    #: what an image keeps depends on its content: `token_schedule` is a bound, and
    #: `visual_token_num` the label of a published setting
    adaptive: ClassVar[bool] = False
    #: False where the method is defined for one crop per image only
    anyres: ClassVar[bool] = True
    #: what `probe_rows` records: "weights", "log_weights" or "scores" (before the softmax)
    probe_form: ClassVar[str] = "weights"
    #: names that its published programs and loaders give to options -> ours
    published_options: ClassVar[dict[str, str]] = {}
    #: options whose name means another one where its published programs are used as they were,
    #: that is where nobody named the method
    published_meaning: ClassVar[dict[str, str]] = {}
    #: environment variables by which its published scripts set options -> our options
    published_environment: ClassVar[dict[str, str]] = {}
    #: keyword of its published interface that holds several options in a dict
    published_group: ClassVar[str | None] = None
    #: options that its published scripts take by place
    positional: ClassVar[tuple[str, ...]] = ("visual_token_num",)
    #: whether `generate` returns what that of the method's release does, see `present`
    published: bool = False
    #: trained weights, registered on the model the method is assigned to
    module: nn.Module | None = None

    def attach_model(self, model: nn.Module) -> None:
        """Called with the whole language model before anything else when the method is assigned.

        A method with trained weights builds and loads its `module` here, see
        `llava.pruning.learned`; it may read `model.config`, `model.model` and `model.lm_head`.
        """

    def use_random_parts(self, model: nn.Module) -> None:
        """Makes `module` of random weights that fit `model`, where the method has one, so that it
        is not loaded when the method is assigned: for measuring times, not for answers."""

    def part_folders(self, model_path: str) -> list[str]:
        """Folders of the trained parts that this method reads for the model of `model_path`."""
        return []

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        """Raises ValueError when this setting cannot run on a model of that shape.

        num_patches: patches of one crop; crops: crops of an image (5 on LLaVA-NeXT, else 1).
        Called when the method is assigned to a model, so that errors come at load time.
        """

    def attach(self, tower) -> None:
        """Called when the method is assigned to a model, with its vision tower (None: it has none).

        A method that needs further weights of the tower's folder loads them here.
        """

    def tower_extras(self, num_layers: int, selected: int) -> dict[int, frozenset[str]]:
        """Extras wanted from other tower layers (0-based): "cls_attention" (B, H, N), "keys"
        (B, N, C), "cls_query" and "cls_key" (B, C), "attention_mean" (B, N) (column mean of the map
        over heads and all queries), "output" (B, N, C). They come in `VisionTokens.layers`.

        selected: the layer whose output are the features.
        """
        return {}

    def before_tower(self, images: Tensor, patch_size: int, crops: int = 1) -> Tensor:
        """Crops (B, 3, S, S) before the tower, `crops` of them sharing a budget. A smaller side, a
        multiple of `patch_size`, gives fewer tokens; each gets the place in the full grid that its
        centre lies on."""
        return images

    def before_tower_layer(self, index: int, tokens: TowerTokens) -> TowerTokens:
        """Between tower layers."""
        return tokens

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        """In vision space, before the projector."""
        return vision

    def after_projector(self, vision: VisionTokens) -> VisionTokens:
        """In language-model space."""
        return vision

    def after_layout(self, image: ImageTokens) -> ImageTokens:
        """The whole sequence of one image, newline tokens included, before it enters the prompt."""
        return image

    def probe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Decoder layers of which attention rows are recorded for the hook that follows them."""
        return ()

    def probe_rows(self, prefill: Prefill) -> Tensor:
        """(B, R) places of the query rows to record; the last prompt token unless overridden."""
        return prefill.last[:, None]

    def before_layer(self, index: int, prefill: Prefill) -> Prefill:
        """Between decoder layers, during prefill and only when the prompt holds an image.

        What it replaces in `prefill` holds from layer `index` on; only `hidden_states` may be
        written to in place. All tensors are on the device of that layer.
        """
        return prefill

    def drafter(self, num_layers: int) -> Drafter | None:
        """What guesses tokens ahead of a decoder with `num_layers` layers; None: nothing does."""
        return None

    def for_call(self, keywords: dict) -> tuple[Pruner, dict]:
        """The method and the keywords of one `generate` call, from those the caller gave: a method
        may read keywords of its published interface."""
        return self, keywords

    def present(self, output, ends: set[int]):
        """What `generate` returns: `output` (ids, or an output object), or what callers of the
        method's published interface expect. ends: ids of tokens that end an answer"""
        return output

    def after_layers(self, prefill: Prefill) -> Prefill:
        """After the last decoder layer of such a prefill, before the final norm. What is dropped
        here is missing in the caches that `pruned_caches` names for the number of layers."""
        return prefill

    def pruned_caches(self, index: int, num_layers: int) -> range:
        """Layers that already ran whose caches lose what was dropped before layer `index`, too."""
        return range(0)

    def drops_from_caches(self, num_layers: int) -> bool:
        """Whether caches of layers that already ran lose tokens at any layer."""
        return any(len(self.pruned_caches(index, num_layers)) for index in range(num_layers + 1))

    def reusable_layers(self, prefill: Prefill) -> int:
        """How many decoder layers, from the first on, this method leaves alone: it neither drops,
        changes nor probes tokens in them. They work the same whatever text follows the image, so
        that `llava.model.reuse` runs them once for all questions about it. Then `before_layer` is
        called before layer 0 and from this layer on.

        prefill: a prompt up to the end of its last image, before layer 0.
        """
        active = overrides(self, "before_layer", "probe_layers", "after_layers")
        return 0 if active else len(prefill.decoder.layers)

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        """Visual tokens entering each decoder layer for one image of `crops` crops; where that
        depends on the image, the most it can be."""
        return [num_patches * crops] * num_layers

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


@dataclass
class BudgetPruner(Pruner):
    """A method with a token budget."""

    visual_token_num: int = 64

    def __post_init__(self):
        number = self.visual_token_num
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(
                f"visual_token_num ({number!r}) must be a whole number of at least 1 token"
            )

    def tokens_per_crop(self, crops: int) -> int:
        """The budget of one crop; `visual_token_num` is the sum over the crops of an image."""
        return self.visual_token_num // crops

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        check_budget(self.visual_token_num, num_patches, crops)


def check_budget(visual_token_num: int, num_patches: int, crops: int) -> None:
    """Raises ValueError when the budget does not fit an image of `crops` crops."""
    available = num_patches * crops
    if visual_token_num > available:
        where = "a crop" if crops == 1 else f"the {crops} crops of an image"
        raise ValueError(
            f"visual_token_num ({visual_token_num}) exceeds the {available} patches of {where}"
        )
    if visual_token_num < crops:
        raise ValueError(
            f"visual_token_num ({visual_token_num}) leaves less than one token for each of the "
            f"{crops} crops of an image"
        )


@dataclass
class SelectPruner(BudgetPruner):
    """Chooses patches between vision tower and projector; a method overrides `select` alone.

    visual_token_num: tokens per image; on LLaVA-NeXT the sum over its crops, shared out equally
    """

    def select(self, vision: VisionTokens) -> Tensor:
        """(B, T) places of the tokens to keep, T = `num_keep(vision)`, in any order."""
        raise NotImplementedError(f"{type(self).__name__} must define select()")

    def num_keep(self, vision: VisionTokens) -> int:
        """Tokens to keep of each crop."""
        return min(self.tokens_per_crop(vision.crops_in_budget), vision.features.shape[1])

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        check_budget(self.visual_token_num, vision.features.shape[1], vision.crops_in_budget)
        return vision.keep(self.select(vision).sort(dim=1).values)

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        return [min(self.tokens_per_crop(crops), num_patches) * crops] * num_layers


@dataclass
class DecoderPruner(BudgetPruner):
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
        return prefill.attention[:, :, -1].mean(dim=1)

    def check(self, num_patches: int, num_layers: int, crops: int = 1) -> None:
        super().check(num_patches, num_layers, crops)
        if not 1 <= self.cut_layer(num_layers) < num_layers:
            raise ValueError(f"layer ({self.layer}) must be below the {num_layers} decoder layers")

    def probe_layers(self, num_layers: int) -> tuple[int, ...]:
        return (self.cut_layer(num_layers) - 1,)

    def before_layer(self, index: int, prefill: Prefill) -> Prefill:
        if index != self.cut_layer(len(prefill.decoder.layers)):
            return prefill
        return prefill.keep_visual(self.score(prefill), self.visual_token_num)

    def reusable_layers(self, prefill: Prefill) -> int:
        num_layers = len(prefill.decoder.layers)
        return min(self.cut_layer(num_layers), *self.probe_layers(num_layers), num_layers)

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        dense, layer = num_patches * crops, self.cut_layer(num_layers)
        kept = min(self.visual_token_num, dense)
        return [dense] * layer + [kept] * (num_layers - layer)


#: the number of an image that says how many of its tokens a `StagedPruner` may keep
BUDGET = "budget"


@dataclass
class StagedPlan:
    """
    cuts: layers with fewer tokens than the one before
    kept: (B, I, L) tokens of every image that enter each layer
    """

    cuts: set[int]
    kept: Tensor


@dataclass
class StagedPruner(Pruner):
    """Drops visual tokens before several decoder layers, those first that the last prompt token
    attends to least in the layer about to run; positions are counted anew after every cut.

    A method overrides `image_schedule` alone.
    """

    reads_text = True

    def image_schedule(
        self, count: int, num_layers: int, num_patches: int, budget: int = 0
    ) -> list[int]:
        """Tokens of an image of `count` tokens that enter each layer; never more than before.

        num_patches: patches of one crop; budget: what the method left for the image in
        `image_extras[BUDGET]`, 0 where it left nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} must define image_schedule()")

    def before_layer(self, index: int, prefill: Prefill) -> Prefill:
        if index == 0:
            prefill.state = self._plan(prefill)
        plan: StagedPlan = prefill.state
        if index not in plan.cuts:
            return prefill
        kept = prefill.at_tokens(plan.kept[..., index])
        return prefill.keep_visual(prefill.next_attention(), kept, renumber=True)

    def reusable_layers(self, prefill: Prefill) -> int:
        return min(self._plan(prefill).cuts, default=len(prefill.decoder.layers))

    def _plan(self, prefill: Prefill) -> StagedPlan:
        """The only wait for the device; what follows has known sizes."""
        num_layers, counts = len(prefill.decoder.layers), prefill.image_counts().tolist()
        budgets = prefill.image_extras.get(BUDGET, [[]] * len(counts))
        plan, cuts, num_patches = [], set(), math.prod(prefill.grid)
        for row, own in zip(counts, budgets, strict=True):
            pairs = zip_longest(row, own[: len(row)], fillvalue=0)
            schedules = [self.image_schedule(n, num_layers, num_patches, b) for n, b in pairs]
            for count, schedule in zip(row, schedules, strict=True):
                before = [count, *schedule[:-1]]
                cuts |= {n for n in range(num_layers) if schedule[n] < before[n]}
            plan.append(schedules)
        return StagedPlan(cuts, on_device(plan, prefill.index.device))

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        return self.image_schedule(num_patches * crops, num_layers, num_patches)


def overrides(method: Pruner, *hooks: str) -> bool:
    """Whether a method defines any of these hooks itself."""
    return any(getattr(type(method), hook) is not getattr(Pruner, hook) for hook in hooks)


def option_names(method: type[Pruner]) -> list[str]:
    """Names of the options a method takes."""
    return (
        [f.name for f in fields(method) if f.init]
        if hasattr(method, "__dataclass_fields__")
        else []
    )
