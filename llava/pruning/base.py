"""What a pruning method sees, and the base classes it builds on.

Letters in shapes, here and in every method:
`B` crops or prompts, `N` patches before and `T` tokens after selection, `S` tokens of a prompt,
`H` heads, `C` vision width, `D` language-model width, `h, w` patch grid of one crop. Layers count
from 0; "before layer K" means that layer K already sees fewer tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from .ops import gather_tokens, rank_within_groups, scale_layer


@dataclass
class TowerTokens:
    """Tokens inside the vision tower, for methods that merge them there.

    hidden_states: (B, 1 + N, C), the class token first
    positions:     (B, N) row-major patch index
    image_index:   (B,) which image of the call a crop belongs to
    valid:         (B, N) False on padding where crops have different counts; None: all are tokens
    merged:        (B, N) True on blended tokens; None: there are none
    """

    hidden_states: Tensor
    positions: Tensor
    image_index: Tensor
    valid: Tensor | None = None
    merged: Tensor | None = None


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


@dataclass
class ImageTokens:
    """Tokens of one image in the order they enter the language model.

    embeds:  (n, D)
    patches: (n,) crop * N + patch; -1 on newline and merged tokens
    offsets: (n,) place in the sequence of the unpruned image
    length:  tokens of the unpruned image
    tags:    (n,) as in `VisionTokens`, 0 on newlines
    blocks:  (rows, columns) of the grids that the unpruned image is read as, one after the other,
             row by row; newlines are the last column of theirs
    crops:   crops the image was cut into
    """

    embeds: Tensor
    patches: Tensor
    offsets: Tensor
    length: int
    tags: Tensor | None = None
    blocks: tuple[tuple[int, int], ...] = ()
    crops: int = 1

    def keep(self, index: Tensor) -> ImageTokens:
        """The tokens at `index` (m,), in that order."""
        return replace(
            self,
            embeds=self.embeds[index],
            patches=self.patches[index],
            offsets=self.offsets[index],
            tags=None if self.tags is None else self.tags[index],
        )


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
    merged:        (B, N) True on tokens blended from several patches; None: there are none
    cls_attention: (B, H, N) what the class token attends to, per head      } None unless the
    keys:          (B, N, C) attention keys of the selected tower layer     } method asks for
    fingerprint:   (B,) integer that depends on the pixels alone            } them in `needs`
    cls_token:     (B, 1, C) the class token of the selected layer       } asked for in `needs`
    layers:        tower layer -> its extras, for what `tower_extras` asks
    questions:     one string per image, for methods that read the text; None unless provided
    relevance:     (B, N) left by a method in `after_encoder` for its `after_projector`
    tags:          (B, N) a method's own mark on each token, travels to `Prefill.tags`
    """

    features: Tensor
    positions: Tensor
    grid: tuple[int, int]
    image_index: Tensor | None = None
    layouts: list[ImageLayout] | None = None
    crops_in_budget: int = 1
    valid: Tensor | None = None
    merged: Tensor | None = None
    cls_attention: Tensor | None = None
    keys: Tensor | None = None
    fingerprint: Tensor | None = None
    cls_token: Tensor | None = None
    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    questions: list[str] | None = None
    relevance: Tensor | None = None
    tags: Tensor | None = None

    @property
    def crops_of_image(self) -> Tensor:
        """(B,) how many crops the image of each crop has."""
        return torch.bincount(self.image_index)[self.image_index]

    def keep(self, index: Tensor) -> VisionTokens:
        """The tokens at `index` (B, T), in that order, with everything that travels with them."""

        def pick(value):
            return None if value is None else value.gather(1, index)

        cls_attention = self.cls_attention
        if cls_attention is not None:
            heads = index[:, None].expand(-1, cls_attention.shape[1], -1)
            cls_attention = cls_attention.gather(2, heads)
        return replace(
            self,
            features=gather_tokens(self.features, index),
            positions=pick(self.positions),
            valid=pick(self.valid),
            merged=pick(self.merged),
            relevance=pick(self.relevance),
            tags=pick(self.tags),
            keys=None if self.keys is None else gather_tokens(self.keys, index),
            cls_attention=cls_attention,
        )

    def keep_mask(self, mask: Tensor) -> VisionTokens:
        """The tokens where `mask` (B, N) is True, in their order; crops may keep different counts,
        shorter ones are padded on the right."""
        if self.valid is not None:
            mask = mask & self.valid
        counts = mask.sum(dim=1)
        most, fewest = torch.stack([counts.amax(), counts.amin()]).tolist()
        order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        valid = None if most == fewest else mask.gather(1, order)
        return replace(self.keep(order), valid=valid)


@dataclass
class Prefill:
    """The prompts of a batch as they enter one decoder layer.

    decoder:       the language model (embeddings, layers), for methods that read or run layers
    layer:         index of the layer about to run
    hidden_states: (B, S, D)
    position_ids:  (B, S) positions seen by RoPE; they may have gaps
    visual_index:  (B, S) which image of the row a token belongs to (0, 1, ...); -1 on text
    patch_index:   (B, S) crop * N + patch of a visual token; -1 on text, newline and merged tokens
    index:         (B, S) place of each token in the prompt that entered layer 0; negative on tokens
                   that were blended inside the decoder
    valid:         (B, S) False on padding; None: every place is a token
    grid:          (h, w) patches per side of one crop before any pruning
    tags:          (B, S) marks a method left in `VisionTokens.tags`; 0 elsewhere
    scratch:       what a method remembers from one layer to the next, for this prefill alone
    attention:     (B, H, R, S) fp32 rows of the previous layer that `probe_rows` chose, by default
                   one, the last prompt token; None where no row was probed
    """

    decoder: nn.Module
    layer: int
    hidden_states: Tensor
    position_ids: Tensor
    visual_index: Tensor
    patch_index: Tensor
    index: Tensor
    valid: Tensor | None
    grid: tuple[int, int]
    tags: Tensor | None = None
    scratch: dict = field(default_factory=dict)
    attention: Tensor | None = None

    @property
    def is_visual(self) -> Tensor:
        """(B, S) True on image tokens."""
        return self.visual_index >= 0

    @property
    def last(self) -> Tensor:
        """(B,) place of the last prompt token of every row."""
        size = self.hidden_states.shape[1]
        places = torch.arange(size, device=self.hidden_states.device)
        if self.valid is None:
            return places[-1:].expand(self.hidden_states.shape[0])
        return (self.valid * places).amax(dim=1)

    def places(self, flags: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Places (B, most) of the tokens where `flags` (B, S) is True, in order, and which of them
        are real (B, most); the others are the last prompt token, so that they can be probed."""
        order = flags.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        real = flags.gather(1, order)
        return torch.where(real, order, self.last[:, None]), real

    def keep(self, mask: Tensor, renumber: bool = False) -> Prefill:
        """Only the tokens where `mask` (B, S) is True, in their order.

        Rows may keep different counts: shorter ones are padded on the left. Positions stay as they
        are (gaps are legal) unless `renumber`, which counts 0, 1, 2, ... again in every row.
        """
        if self.valid is not None:
            mask = mask & self.valid
        counts = mask.sum(dim=1)
        longest, shortest = torch.stack([counts.amax(), counts.amin()]).tolist()
        order = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, mask.shape[1] - longest :]
        valid = None if longest == shortest else mask.gather(1, order)
        return self.take(order, valid, renumber)

    def take(self, order: Tensor, valid: Tensor | None, renumber: bool = False) -> Prefill:
        """The tokens at `order` (B, n), in that order; `valid` (B, n) is False on padding among
        them, which stands on the left. `renumber` as in `keep`."""
        position_ids = self.position_ids.gather(1, order)
        if renumber:
            ones = torch.ones_like(order) if valid is None else valid.long()
            position_ids = (ones.cumsum(dim=1) - 1).clamp(min=0)
        kept = replace(
            self,
            hidden_states=gather_tokens(self.hidden_states, order),
            position_ids=position_ids,
            visual_index=self.visual_index.gather(1, order),
            patch_index=self.patch_index.gather(1, order),
            index=self.index.gather(1, order),
            valid=valid,
            tags=None if self.tags is None else self.tags.gather(1, order),
            attention=None,
        )
        if valid is not None:  # padding belongs to no image
            kept.visual_index = kept.visual_index.masked_fill(~valid, -1)
        return kept

    def keep_and_append(
        self, mask: Tensor, tokens: Tensor, image: Tensor, real: Tensor, renumber: bool = False
    ) -> Prefill:
        """The tokens where `mask` (B, S) is True and, behind those of their image, new ones.

        tokens (B, M, D) blended from several; image (B, M) of the row they belong to, ascending;
        real (B, M) False on padding. Their `index` counts down from -1 over the whole prefill.
        """
        if self.valid is not None:
            mask = mask & self.valid
        batch, size = mask.shape
        count, none = tokens.shape[1], torch.full_like(image, -1)
        places = torch.arange(size, device=mask.device).expand(batch, -1)
        ends = places.new_zeros(batch, self.image_counts().shape[1])
        owner = self.visual_index.clamp(min=0)
        ends = ends.scatter_reduce(1, owner, places * self.is_visual, "amax")  # (B, I)
        number = torch.arange(count, device=mask.device)
        behind = ends.gather(1, image) * (count + 1) + 1 + number
        key = torch.cat([places * (count + 1), behind], dim=1)
        alive = torch.cat([mask, real], dim=1)
        counts = alive.sum(dim=1)
        longest, shortest = torch.stack([counts.amax(), counts.amin()]).tolist()
        order = key.masked_fill(~alive, -1).argsort(dim=1, stable=True)
        order = order[:, order.shape[1] - longest :]
        valid = None if longest == shortest else alive.gather(1, order)
        first = self.scratch.get("blended", 0)
        self.scratch["blended"] = first + count
        grown = replace(
            self,
            hidden_states=torch.cat([self.hidden_states, tokens.to(self.hidden_states)], dim=1),
            position_ids=torch.cat([self.position_ids, ends.gather(1, image)], dim=1),
            visual_index=torch.cat([self.visual_index, image], dim=1),
            patch_index=torch.cat([self.patch_index, none], dim=1),
            index=torch.cat([self.index, none - first - number], dim=1),
            tags=None if self.tags is None else torch.cat([self.tags, none + 1], dim=1),
        )
        return grown.take(order, valid, renumber)

    def images(self) -> tuple[Tensor, Tensor, Tensor]:
        """The visual tokens image by image: row (G, 1), place (G, V) in that row, and real (G, V),
        False on padding. G counts rows x images; V is the most tokens an image has."""
        counts = self.image_counts()
        most = int(counts.amax())
        own = torch.arange(counts.shape[1], device=counts.device)[:, None]
        member = (self.visual_index[:, None] == own).flatten(0, 1).to(torch.uint8)  # (G, S)
        place = member.argsort(dim=1, descending=True, stable=True)[:, :most]
        row = torch.arange(counts.shape[0], device=counts.device)
        return (
            row.repeat_interleave(counts.shape[1])[:, None],
            place,
            member.gather(1, place).bool(),
        )

    def attention_rows(self, layer: int, rows: Tensor) -> Tensor:
        """(B, H, R, S) fp32 rows of the attention map that decoder layer `layer` would have on the
        tokens as they are now; rows (B, R) are the places of the queries."""
        return self.decoder.attention_rows(
            layer, self.hidden_states, self.position_ids, rows, self.valid
        )

    def next_attention(self) -> Tensor:
        """(B, S) fp32 head mean of what the last prompt token attends to in the layer about to
        run."""
        return self.attention_rows(self.layer, self.last[:, None])[:, :, 0].mean(dim=1)

    def image_counts(self) -> Tensor:
        """(B, I) tokens of every image of every row; I is the most images a row has, at least 1."""
        images = max(1, int(self.visual_index.amax()) + 1)
        owner = self.visual_index.masked_fill(~self.is_visual, images)
        counts = owner.new_zeros(owner.shape[0], images + 1)
        return counts.scatter_add_(1, owner, torch.ones_like(owner))[:, :images]

    def at_tokens(self, values: Tensor) -> Tensor:
        """(B, S) value of the image a token belongs to, from one per image (B, I); text gets that
        of the first image."""
        return values.gather(1, self.visual_index.clamp(min=0))

    def keep_visual(self, score: Tensor, num_keep: int | Tensor, renumber: bool = False) -> Prefill:
        """Keeps all text and, of every image, `num_keep` tokens with the highest `score` (B, S).

        `num_keep` is one count for all images or a (B, S) count looked up at each token. Equal
        scores go to the earlier token.
        """
        rank = rank_within_groups(score, self.visual_index)
        return self.keep(~self.is_visual | (rank < num_keep), renumber)


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
    #: what an image keeps depends on its content: `token_schedule` is a bound, and
    #: `visual_token_num` the label of a published setting
    adaptive: ClassVar[bool] = False
    #: False where the method is defined for one crop per image only
    anyres: ClassVar[bool] = True
    #: trained weights, registered on the model the method is assigned to
    module: nn.Module | None = None

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
        """Between decoder layers, during prefill and only when the prompt holds an image."""
        return prefill

    def pruned_caches(self, index: int, num_layers: int) -> range:
        """Layers that already ran whose caches lose what was dropped before layer `index`, too."""
        return range(0)

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        """Visual tokens entering each decoder layer for one image of `crops` crops; where that
        depends on the image, the most it can be."""
        return [num_patches * crops] * num_layers

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


@dataclass
class _BudgetPruner(Pruner):
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
class SelectPruner(_BudgetPruner):
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
class DecoderPruner(_BudgetPruner):
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

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        dense, layer = num_patches * crops, self.cut_layer(num_layers)
        kept = min(self.visual_token_num, dense)
        return [dense] * layer + [kept] * (num_layers - layer)


@dataclass
class StagedPruner(Pruner):
    """Drops visual tokens before several decoder layers, those first that the last prompt token
    attends to least in the layer about to run; positions are counted anew after every cut.

    A method overrides `image_schedule` alone.
    """

    reads_text = True

    def image_schedule(
        self, count: int, num_layers: int, num_patches: int, tag: int = 0
    ) -> list[int]:
        """Tokens of an image of `count` tokens that enter each layer; never more than before.

        num_patches: patches of one crop; tag: the largest mark that the method left on the image's
        tokens (`VisionTokens.tags`).
        """
        raise NotImplementedError(f"{type(self).__name__} must define image_schedule()")

    def before_layer(self, index: int, prefill: Prefill) -> Prefill:
        if index == 0:
            prefill.scratch["plan"] = self._plan(prefill)
        cuts, kept = prefill.scratch["plan"]
        if index not in cuts:
            return prefill
        score = prefill.next_attention()
        return prefill.keep_visual(score, prefill.at_tokens(kept[..., index]), renumber=True)

    def _plan(self, prefill: Prefill) -> tuple[set[int], Tensor]:
        """Layers with a cut, and how many tokens of every image (B, I) enter each layer (..., L).

        The only wait for the device; what follows has known sizes.
        """
        num_layers, counts = len(prefill.decoder.layers), prefill.image_counts()
        tags = torch.zeros_like(counts)
        if prefill.tags is not None:
            owner = prefill.visual_index.clamp(min=0)
            tags.scatter_reduce_(1, owner, prefill.tags * prefill.is_visual, "amax")
        images, num_patches = torch.stack([counts, tags], dim=-1), math.prod(prefill.grid)
        plan = [
            [self.image_schedule(count, num_layers, num_patches, tag) for count, tag in row]
            for row in images.tolist()
        ]
        cuts = {
            layer
            for row, own in zip(plan, counts.tolist(), strict=True)
            for schedule, count in zip(row, own, strict=True)
            for layer, kept in enumerate(schedule)
            if kept < (schedule[layer - 1] if layer else count)
        }
        return cuts, torch.tensor(plan, device=counts.device)

    def token_schedule(self, num_patches: int, num_layers: int, crops: int = 1) -> list[int]:
        return self.image_schedule(num_patches * crops, num_layers, num_patches)


def option_names(method: type[Pruner]) -> list[str]:
    """Names of the options a method takes."""
    return (
        [f.name for f in fields(method) if f.init]
        if hasattr(method, "__dataclass_fields__")
        else []
    )
