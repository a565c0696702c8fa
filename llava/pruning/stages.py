"""The two places where a method can act: on the way to the prompt, and inside the decoder.

A method is one of the stages or both, `class Mine(DecoderStage, Pruner)`, and overrides what it
needs; what it leaves alone does nothing. What belongs to one image or prompt travels in
`VisionTokens`, `ImageTokens` and `Prefill`, so that one method serves any number of requests.

Shapes use the letters of `llava.pruning.tokens`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .drafter import Drafter
from .prefill import Prefill
from .tokens import ImageTokens, TowerTokens, VisionTokens


class VisionStage:
    """From the vision tower to the prompt. The hooks stand in the order in which they run."""

    name: ClassVar[str] = "none"
    #: cues that the vision tower has to provide, see `llava.pruning.cues`: "salience", "keys",
    #: "cls_attention", ..., of the layer of the features, and "fingerprint" of the pixels
    needs: frozenset[str] = frozenset()
    #: cues that are taken where the tower has them
    wants: ClassVar[frozenset[str]] = frozenset()
    #: cue -> what to set to do without it
    does_without: ClassVar[dict[str, str]] = {}
    #: what it does between tower layers it does in `after_projector` where tokens are blocks of
    #: patches
    merges_blocks: ClassVar[bool] = False
    #: all tokens that it leaves are blended from several, so that none stays as it is
    blends: ClassVar[bool] = False
    #: a hook reads `VisionTokens.questions`; other methods are not given them
    reads_question: bool = False
    #: "sequence": kept visual tokens are counted 0, 1, 2, ...; "grid": they stay where the unpruned
    #: image would have put them, and the text after the image stays where it was. Where positions
    #: have several axes, which are places in a picture, all methods are "grid"
    position_policy: ClassVar[str] = "sequence"
    #: tokens carry a bias that attention adds (`llava.pruning.tokens.KEY_BIAS`), which SDPA can do
    #: and FlashAttention cannot
    biases_attention: ClassVar[bool] = False
    #: whether the patches that stay of a crop enter the prompt in raster order
    in_raster_order: bool = True
    #: False where the method is defined for one crop per image only
    anyres: ClassVar[bool] = True
    #: LLaVA-NeXT: tiles (across, down) every image is cut into, without newlines and unpadding;
    #: None: the resolutions and the layout the checkpoint was trained with
    anyres_tiles: ClassVar[tuple[int, int] | None] = None
    #: LLaVA-NeXT: image settings that replace those of the checkpoint while the method is in use,
    #: for example {"mm_patch_merge_type": "spatial"}
    anyres_config: ClassVar[dict] = {}

    def tower_extras(self, num_layers: int, selected: int) -> dict[int, frozenset[str]]:
        """Cues wanted from tower layers (0-based), see `llava.pruning.cues`: "salience",
        "cls_attention", "keys", "cls_query", "cls_key", "attention_mean", "output",
        "output_mean". They come in `VisionTokens.layers`.

        selected: the layer whose output are the features.
        """
        return {}

    def before_tower(self, images: Tensor, patch_size: int, crops: int = 1) -> Tensor:
        """Crops (B, 3, S, S) before the tower, `crops` of them sharing a budget; where images have
        grids of their own, one image (1, 3, height, width), or all frames of a video. Smaller
        sides, multiples of `patch_size` pixels, give fewer tokens; in a crop each gets the place in
        the full grid that its centre lies on, an image of its own grid is a smaller image."""
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

    def after_layouts(self, images: list[ImageTokens]) -> list[ImageTokens]:
        """Those of all images of a call at once: for methods that prune images of one size
        together, where one after the other would be slow."""
        return [self.after_layout(image) for image in images]


def last_token(prefill: Prefill) -> Tensor:
    """(B, 1) place of the last prompt token."""
    return prefill.last[:, None]


@dataclass(frozen=True)
class Probe:
    """What a method wants recorded of some layers, for the hook that follows each of them.

    layers: decoder layers of which it is recorded
    rows:   gives the places (B, R) of the query rows, from the prompts as they enter the layer
    form:   rows of attention in `Prefill.attention`, as "weights", "log_weights" or "scores"
            (scaled products before the softmax); or "keys": no rows, but the keys of all tokens
            in `Prefill.keys`, which cost nothing
    """

    layers: tuple[int, ...] = ()
    rows: Callable[[Prefill], Tensor] = last_token
    form: str = "weights"

    FORMS: ClassVar[tuple[str, ...]] = ("weights", "log_weights", "scores", "keys")

    def __post_init__(self):
        if self.form not in self.FORMS:
            raise ValueError(f"unknown form {self.form!r} of a probe, choose from {self.FORMS}")

    def check(self, num_layers: int) -> None:
        """Raises ValueError when a layer is none of the decoder's."""
        if odd := [layer for layer in self.layers if not 0 <= layer < num_layers]:
            what = "keys" if self.form == "keys" else "attention rows"
            raise ValueError(f"{what} of layer {odd[0]} are asked for, of {num_layers}")


class DecoderStage:
    """Inside the decoder. The hooks stand in the order in which they run."""

    name: ClassVar[str] = "none"
    #: the choice reads tokens behind the image: running prompt and answer again from the start, as
    #: `use_cache=False` does at every step, may choose other tokens
    reads_text: ClassVar[bool] = False

    def before_prompt(self, image: ImageTokens) -> ImageTokens:
        """The finished sequence of one image: leaves in `extras` and `image_extras` what the hooks
        below want to know of it, and nothing else changes."""
        return image

    def probe(self, num_layers: int) -> Probe:
        """The attention rows, or keys, to record; a method that wants none gives `Probe()`."""
        return Probe()

    def blind_cuts(self, num_layers: int) -> tuple[int, ...]:
        """Layers before which `before_layer` drops tokens without a look at their hidden states:
        what follows attention in the layer before may then be left to the tokens that stay."""
        return ()

    def before_layer(self, index: int, prefill: Prefill) -> Prefill:
        """Between decoder layers, during prefill and only when the prompt holds an image.

        What it replaces in `prefill` holds from layer `index` on; only `hidden_states` may be
        written to in place. All tensors are on the device of that layer.
        """
        return prefill

    def after_layers(self, prefill: Prefill) -> Prefill:
        """After the last decoder layer of such a prefill, before the final norm. What is dropped
        here is missing in the caches that `pruned_caches` names for the number of layers."""
        return prefill

    def acts_behind(self, num_layers: int) -> bool:
        """Whether `after_layers` has something to do in a decoder of `num_layers`. It is not called
        where not: then all tokens but the last may end with their keys in the last layer."""
        return "after_layers" in vars(self) or fills(type(self), DecoderStage, "after_layers")

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
        acts = fills(type(self), DecoderStage, "probe", "before_layer", "after_layers")
        return 0 if acts else len(prefill.decoder.layers)

    def drafter(self, num_layers: int) -> Drafter | None:
        """What guesses tokens ahead of a decoder with `num_layers` layers; None: nothing does."""
        return None


#: what a stage is called for while a model runs, in that order
HOOKS: dict[type, tuple[str, ...]] = {
    VisionStage: (
        "before_tower",
        "before_tower_layer",
        "after_encoder",
        "after_projector",
        "after_layout",
        "after_layouts",
    ),
    DecoderStage: ("before_prompt", "before_layer", "after_layers"),
}
Stage = VisionStage | DecoderStage


def fills(method: type, stage: type[Stage], *names: str) -> bool:
    """Whether a class derived from `stage` defines any of these hooks itself."""
    return any(getattr(method, name) is not getattr(stage, name) for name in names)


def filled_hooks(vision: VisionStage, decoder: DecoderStage) -> list[tuple[Stage, str]]:
    """(stage, name) of the hooks that the stages of a method fill."""
    pairs = ((vision, VisionStage), (decoder, DecoderStage))
    return [
        (own, name)
        for own, stage in pairs
        for name in HOOKS[stage]
        if fills(type(own), stage, name)
    ]


def acts_inside(decoder: DecoderStage) -> bool:
    """Whether a stage is called while the decoder runs."""
    return fills(type(decoder), DecoderStage, "probe", "before_layer", "after_layers")
