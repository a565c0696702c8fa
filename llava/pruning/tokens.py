"""What travels through the model and past a pruning method: tokens of crops, images and prompts.

Letters in shapes, here and in every method:
`B` crops or prompts, `N` patches before and `T` tokens after selection, `S` tokens of a prompt,
`H` heads, `C` vision width, `D` language-model width, `h, w` patch grid of one crop. Layers count
from 0; "before layer K" means that layer K already sees fewer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .ops import gather_tokens, rank_within_groups


@dataclass
class TowerTokens:
    """Tokens inside the vision tower, for methods that merge them there.

    hidden_states: (B, 1 + N, C), the class token first
    positions:     (B, N) row-major patch index
    image_index:   (B,) which image of the call a crop belongs to
    valid:         (B, N) False on padding where crops have different counts; None: all are tokens
    merged:        (B, N) True on blended tokens; None: there are none
    key_bias:      (B, 1 + N) fp32 what is added to the products of all queries with a token's key,
                   before the softmax: the logarithm of how many patches it stands for, say; 0 on
                   others. None: nothing
    """

    hidden_states: Tensor
    positions: Tensor
    image_index: Tensor
    valid: Tensor | None = None
    merged: Tensor | None = None
    key_bias: Tensor | None = None


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
    context: (n, E) as in `VisionTokens`, 0 on newlines
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
    context: Tensor | None = None

    def keep(self, index: Tensor) -> ImageTokens:
        """The tokens at `index` (m,), in that order."""
        return replace(
            self,
            embeds=self.embeds[index],
            patches=self.patches[index],
            offsets=self.offsets[index],
            tags=None if self.tags is None else self.tags[index],
            context=None if self.context is None else self.context[index],
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
    questions:     one string per image, for methods with `reads_question`; None unless provided
    relevance:     (B, N) left by a method in `after_encoder` for its `after_projector`
    tags:          (B, N) a method's own mark on each token, travels to `Prefill.tags`
    context:       (B, N, E) a method's own values for each token, travel to `Prefill.context`
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
    context: Tensor | None = None

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
            context=None if self.context is None else gather_tokens(self.context, index),
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
    scratch:       what a method remembers from one layer to the next, for this prefill alone;
                   tensors in dicts, lists, tuples and dataclasses follow the layers' device
    attention:     (B, H, R, S) fp32 rows of the previous layer that `probe_rows` chose, by default
                   one, the last prompt token; None where no row was probed
    context:       (B, S, E) values a method left in `VisionTokens.context`, 0 elsewhere; None: none
    next_position: (B,) position of the first generated token; None: one after the last in use
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
    context: Tensor | None = None
    next_position: Tensor | None = None

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
            context=None if self.context is None else gather_tokens(self.context, order),
            attention=None,
            next_position=None if renumber else self.next_position,
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
            context=None,  # blended tokens have none of their own
        )
        return grown.take(order, valid, renumber)

    def append(self, tokens: Tensor) -> Prefill:
        """New tokens (B, M, D) behind every prompt, at the positions that follow it.

        They are no part of the prompt: their `index` counts down from -1 as in `keep_and_append`,
        and generation continues at the position it would have without them.
        """
        batch, count = tokens.shape[:2]
        none = self.index.new_full((batch, count), -1)
        number = torch.arange(count, device=none.device)
        follows = self.next_position
        if follows is None:
            places = self.position_ids
            if self.valid is not None:
                places = places.masked_fill(~self.valid, -1)
            follows = places.amax(dim=1) + 1
        first = self.scratch.get("blended", 0)
        self.scratch["blended"] = first + count
        real = torch.ones_like(none, dtype=torch.bool)
        context = self.context
        if context is not None:
            context = torch.cat([context, context.new_zeros(batch, count, context.shape[2])], dim=1)
        return replace(
            self,
            hidden_states=torch.cat([self.hidden_states, tokens.to(self.hidden_states)], dim=1),
            position_ids=torch.cat([self.position_ids, follows[:, None] + number], dim=1),
            visual_index=torch.cat([self.visual_index, none], dim=1),
            patch_index=torch.cat([self.patch_index, none], dim=1),
            index=torch.cat([self.index, none - first - number], dim=1),
            valid=None if self.valid is None else torch.cat([self.valid, real], dim=1),
            tags=None if self.tags is None else torch.cat([self.tags, none + 1], dim=1),
            context=context,
            attention=None,
            next_position=follows,
        )

    def record_importance(self, score: Tensor) -> None:
        """Leaves `score` (B, S), what the method thinks of each token, for a trace."""
        self.scratch["importance"] = self.index, score

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
