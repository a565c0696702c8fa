"""Vision tokens on their way to the prompt: in the tower, behind it, and as one image.

Letters in shapes, here and in every method:
`B` crops or prompts, `N` patches before and `T` tokens after selection, `S` tokens of a prompt,
`H` heads, `C` vision width, `D` language-model width, `h, w` patch grid of one crop. Layers count
from 0; "before layer K" means that layer K already sees fewer tokens. Where a projector merges
blocks of patches into one token each, everything here counts blocks: `N` is their number, `h, w`
their grid, and `C` the width of their patches side by side.

Values of a method's own travel in `extras`, by name: one for each token, (B, N, ...) here and
(B, S, ...) in the `Prefill`, zeros on tokens that are none of the method's (text, newlines). What
holds for a whole image is a number of the host and travels in `image_extras`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from .counts import Known, counted
from .ops import true_first
from .per_token import at, mapped, per_token
from .position_bias import PositionBias
from .required import required

#: the extra that is True on tokens blended from several patches; it ends where prompts are made
MERGED = "merged"
#: the extra that is added to attention to a token in the decoder, see `Prefill.key_bias`
KEY_BIAS = "key_bias"
#: numbers of an image that the model itself leaves, see `Prefill.grids` and `Prefill.frame_pairs`
GRID, PAIRS = ("grid_rows", "grid_columns"), "frame_pairs"
#: the cues that are fields of `VisionTokens`
Cue = Literal["salience", "cls_attention", "keys", "cls_token", "fingerprint"]


@dataclass
class TowerTokens:
    """Tokens inside the vision tower, for methods that merge them there.

    hidden_states: (B, 1 + N, C), the class token first
    positions:     (B, N) row-major patch index
    image_index:   (B,) which image of the call a crop belongs to
    valid:         (B, N) False on padding where crops have different counts; None: all are tokens
    key_bias:      (B, 1 + N) fp32 what the tower's layers add to the products of all queries with
                   a token's key, before the softmax: the logarithm of how many patches it stands
                   for, say; None: nothing. The decoder has one of its own, `extras["key_bias"]`
    extras:        as in `VisionTokens`, which they become
    all_patches:   likewise
    known:         likewise
    """

    hidden_states: Tensor
    positions: Tensor
    image_index: Tensor
    valid: Tensor | None = None
    key_bias: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    all_patches: Tensor | None = None
    known: Known[list[int]] | None = None


@dataclass(frozen=True)
class ImageLayout:
    """How the crops of one image stand to one another.

    crops:  which crops of the call
    tiles:  (across, down) large grid that all crops but the first make, row by row; None: the crops
            only follow one another
    window: (top, bottom, left, right) patches of the large grid that show the image
    """

    crops: slice
    tiles: tuple[int, int] | None = None
    window: tuple[int, int, int, int] | None = None

    @property
    def mosaic(self) -> tuple[tuple[int, int], tuple[int, int, int, int]] | None:
        """`tiles` and `window` of an image that has them."""
        if self.tiles is None or self.window is None:
            return None
        return self.tiles, self.window


@dataclass
class ImageTokens:
    """Tokens of one image in the order they enter the language model.

    embeds:  (n, D)
    patches: (n,) crop * N + patch; -1 on newline and merged tokens
    offsets: (n,) place in the sequence of the unpruned image
    length:  tokens of the unpruned image
    extras:  name -> (n, ...) as in `VisionTokens`, 0 on newlines
    image_extras: name -> a number of the method for this image
    blocks:  (rows, columns) of the grids that the unpruned image is read as, one after the other,
             row by row; newlines are the last column of theirs
    crops:   crops the image was cut into
    places:  positions that the unpruned image takes; None: one for each token
    positions: (n, A) where the tokens stand, from where the image begins, in models whose positions
             have A axes; None: at their offsets
    grid:    (h, w) of one crop
    frame_pairs: pairs of frames of a video, which are its crops; 0: this is an image
    position_bias: what tokens of its prompt add to attention by where they stand; None: nothing
    """

    embeds: Tensor = field(metadata=per_token(0))
    patches: Tensor = field(metadata=per_token(0))
    offsets: Tensor = field(metadata=per_token(0))
    length: int
    extras: dict[str, Tensor] = field(default_factory=dict, metadata=per_token(0))
    image_extras: dict[str, int | float] = field(default_factory=dict)
    blocks: tuple[tuple[int, int], ...] = ()
    crops: int = 1
    places: int | None = None
    positions: Tensor | None = field(default=None, metadata=per_token(0))
    grid: tuple[int, int] | None = None
    frame_pairs: int = 0
    position_bias: PositionBias | None = None

    @property
    def extent(self) -> int:
        """By how many positions the text behind the unpruned image moves on."""
        return self.length if self.places is None else self.places

    @property
    def crop_grid(self) -> tuple[int, int]:
        """`grid`, which models say of every image; ValueError where it is None."""
        return required(
            self.grid, "the image does not say how many patches a crop has: set its grid"
        )

    def keep(self, index: Tensor | slice) -> ImageTokens:
        """The tokens at `index` (m,), in that order, or where a mask (n,) is True."""
        if isinstance(index, Tensor) and index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        return replace(self, **mapped(self, lambda x, _: x[index]))


def keep_chosen(
    images: Sequence[ImageTokens],
    counts: Sequence[int],
    choose: Callable[[list[ImageTokens], int], Tensor],
) -> list[ImageTokens]:
    """Images with `counts` of their tokens, those that have more; images of one size that keep as
    many are chosen from at once.

    choose: images (B) that all have n tokens, and how many stay -> places (B, count) of these in
    the order in which they enter the prompt
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for number, (image, count) in enumerate(zip(images, counts, strict=True)):
        if (size := len(image.embeds)) > count:
            groups.setdefault((size, count), []).append(number)
    kept = list(images)
    for (_, count), numbers in groups.items():
        chosen = choose([images[number] for number in numbers], count)
        for number, own in zip(numbers, chosen, strict=True):
            kept[number] = images[number].keep(own)
    return kept


@dataclass
class VisionTokens:
    """Patch tokens of B image crops on their way from the vision tower to the language model.

    features:      (B, N, C), width D after the projector
    positions:     (B, N) row-major index of each token in the h x w grid of its crop. A token that
                   stands for no patch has -1 or h * w and above: on LLaVA-NeXT those of the tiles
                   follow the grid, first the -1 tile by tile, then the others tile by tile
    grid:          (h, w) patches per side of one crop
    image_index:   (B,) which image of the call a crop belongs to; crops of an image are neighbours
    layouts:       one per image; None: every crop is an image
    crops_in_budget: crops that share `visual_token_num`: 5 on LLaVA-NeXT (640 = 5 x 128), else 1
    valid:         (B, N) False on padding where crops keep different counts; None: all are tokens
    block:         patches that a token stands for; above 1 the projector merges them into one
    num_heads:     attention heads of the tower
    project:       in `after_projector`, the projector: further features (..., N, C) of the tower to
                   (..., N, D), as it made `features` of those in front of it
    salience, cls_attention, keys, cls_token, fingerprint: the cues that the method asks for in
                   `needs` and `wants`, see `llava.pruning.cues`; None: not asked for, or not there.
                   `cue` gives one that has to be there
    layers:        tower layer -> its cues, for what `tower_extras` asks
    questions:     one string per image, for methods with `reads_question`; None unless provided
    extras:        name -> (B, N, ...) values of the method, which travel with the tokens into the
                   decoder. "merged" is read on the way: True marks tokens blended from several
                   patches, which have no place in the grid any more. "key_bias" (B, N) fp32 is
                   added to attention to them in the decoder, see `Prefill.key_bias`
    image_extras:  name -> one number per image, likewise
    all_patches:   `positions` of the tower itself: where they are still that object, and nothing is
                   padding, no patch is missing
    known:         numbers about `valid`, see `crop_counts`
    """

    features: Tensor = field(metadata=per_token())
    positions: Tensor = field(metadata=per_token())
    grid: tuple[int, int]
    image_index: Tensor | None = None
    layouts: list[ImageLayout] | None = None
    crops_in_budget: int = 1
    valid: Tensor | None = field(default=None, metadata=per_token())
    block: int = 1
    num_heads: int = 1
    project: Callable[[Tensor], Tensor] | None = None
    salience: Tensor | None = field(default=None, metadata=per_token())
    cls_attention: Tensor | None = field(default=None, metadata=per_token(2))
    keys: Tensor | None = field(default=None, metadata=per_token())
    fingerprint: Tensor | None = None
    cls_token: Tensor | None = None
    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    questions: list[str] | None = None
    extras: dict[str, Tensor] = field(default_factory=dict, metadata=per_token())
    image_extras: dict[str, list[int | float]] = field(default_factory=dict)
    all_patches: Tensor | None = None
    known: Known[list[int]] | None = None

    def cue(self, name: Cue) -> Tensor:
        """The cue of that name, which the method names in `needs`; ValueError where it is None."""
        found: Tensor | None = getattr(self, name)
        return required(
            found,
            f"the cue {name!r} is read but not there: a method gets the cues that it names in "
            "`needs`, and tokens that were blended before it have none",
        )

    def layer_cue(self, name: str) -> Tensor:
        """(B, N, ...) that cue of the first tower layer in `layers` that has it, which the method
        names in `tower_extras`; ValueError where none has."""
        found = (self.layers[layer].get(name) for layer in sorted(self.layers))
        return required(
            next((cue for cue in found if cue is not None), None),
            f"the cue {name!r} of a tower layer is read but not there: a method gets the cues that "
            "it names in `tower_extras`",
        )

    @property
    def owners(self) -> Tensor:
        """(B,) `image_index`, which models always give; ValueError where it is None."""
        return required(
            self.image_index, "which image a crop belongs to is not said: set image_index"
        )

    def projected(self, features: Tensor) -> Tensor:
        """(..., N, D) what the projector makes of features (..., N, C) of the tower, see `project`;
        ValueError outside `after_projector`."""
        project = required(self.project, "the projector can be called in after_projector alone")
        return project(features)

    @property
    def complete(self) -> bool:
        """Whether the tokens are those of the whole grid of every crop, in order."""
        return self.valid is None and self.positions is self.all_patches

    def crops_of_images(self) -> list[slice]:
        """Which crops every image was cut into, image by image."""
        if self.layouts is None:
            return [slice(crop, crop + 1) for crop in range(len(self.features))]
        return [layout.crops for layout in self.layouts]

    def crop_counts(self) -> list[int]:
        """Tokens of every crop, padding left out. Waits for the device where something else than
        the methods of this class replaced `valid`."""
        if self.valid is None:
            return [self.features.shape[1]] * self.features.shape[0]
        known = self.known
        if known is None or known.counts is None or not known.holds_for(self.valid):
            self.valid = valid = counted(self.valid)
            counts: list[int] = valid.sum(dim=1).tolist()
            self.known = Known((valid,), counts)
            return counts
        return known.counts

    def keep(self, index: Tensor) -> VisionTokens:
        """The tokens at `index` (B, T), in that order, with everything that travels with them."""
        return replace(self, **mapped(self, at(index)))

    def keep_mask(self, mask: Tensor, counts: list[int] | None = None) -> VisionTokens:
        """The tokens where `mask` (B, N) is True, in their order; crops may keep different counts,
        shorter ones are padded on the right.

        counts: tokens that stay of every crop; None: the device is asked, and waited for
        """
        if self.valid is not None:
            mask = mask & self.valid
        if counts is None:
            counts = mask.sum(dim=1).tolist()
        order = true_first(mask)
        order = order[:, : max(counts)]
        valid = None if min(counts) == max(counts) else counted(mask.gather(1, order))
        kept = replace(self, **mapped(self, at(order), without=("valid",)), valid=valid)
        kept.known = Known((valid,), counts)
        return kept


def without_cues(vision: VisionTokens) -> VisionTokens:
    """For methods that blend tokens: what a tower says of each token does not hold for blends."""
    return replace(vision, salience=None, cls_attention=None, keys=None)
