"""The prompts of a batch on their way through the decoder, and what a method can do to them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .branches import Branches
from .counts import PADDING, Known, TokenCounts, counted
from .interfaces import Decoder
from .ops import hides_tokens, on_device, rank_within_groups, true_first, true_last
from .per_token import at, each, mapped, per_token, with_zeros
from .position_bias import PositionBias
from .required import required
from .tokens import GRID, KEY_BIAS, PAIRS

#: tokens of a batch up to which a layer mostly reads its weights, so that a few more cost next to
#: nothing: less than to wait for the device
NARROW = 512


@dataclass
class Prefill:
    """The prompts of a batch as they enter one decoder layer; letters as in `llava.pruning.tokens`.

    decoder:       the language model (embeddings, layers), for methods that read or run layers
    layer:         index of the layer about to run
    hidden_states: (B, S, D)
    position_ids:  (B, S) positions seen by RoPE, (B, S, A) on A axes; they may have gaps
    visual_index:  (B, S) which image of the row a token belongs to (0, 1, ...); -1 on text
    patch_index:   (B, S) crop * N + patch of a visual token; -1 on text, newline and merged tokens
    index:         (B, S) place of each token in the prompt that entered layer 0; negative on tokens
                   that were blended inside the decoder
    valid:         (B, S) False on padding; None: every place is a token
    extras:        name -> (B, S, ...) values that the method left in `VisionTokens.extras` or
                   `ImageTokens.extras`, zeros on all other tokens; "key_bias" is read by the
                   layers, see `key_bias`
    image_extras:  name -> one number per image for every row, from `ImageTokens.image_extras`
    position_bias: what tokens add to attention by where they stand, from
                   `ImageTokens.position_bias`; None: nothing
    asking:        (B, S) False on tokens that look at others without it: those of prompts whose
                   images have none, and maybe of the answer; None: all look with it
    state:         what the method remembers from one layer to the next, for this prefill alone: a
                   dataclass of its own; tensors in it, also in dicts, lists and tuples, follow the
                   layers' device
    attention:     (B, H, R, S) fp32 rows of the previous layer that the method's `Probe` chose, by
                   default one, the last prompt token; None where no row was recorded
    keys:          (B, G, S, d) keys after RoPE of the previous layer, where the `Probe` asked for
                   them; not to be written to: caches use them as well
    drafter_row:   (B, H, 1, S) fp32 what the last prompt token attends to in the last layer of the
                   drafter, when that ran on the tokens as they are now; else None
    drafter_input: (B, S, D) what entered that layer, likewise
    next_position: (B,) position of the first generated token; None: one after the last in use
    branches:      of the tokens behind the prompts, where those are guesses that form a tree; the
                   same for all rows
    importance:    what `record_importance` left for the trace
    num_blended:   tokens with a negative `index` there were so far
    num_images:    the most images that a row has, at least 1; None: nobody counted
    known:         numbers about `visual_index` and `valid`, see `counts`
    """

    decoder: Decoder
    layer: int
    hidden_states: Tensor = field(metadata=per_token())
    position_ids: Tensor = field(metadata=per_token())
    visual_index: Tensor = field(metadata=per_token())
    patch_index: Tensor = field(metadata=per_token())
    index: Tensor = field(metadata=per_token())
    valid: Tensor | None = field(metadata=per_token())
    extras: dict[str, Tensor] = field(default_factory=dict, metadata=per_token())
    image_extras: dict[str, list[list[Any]]] = field(default_factory=dict)
    position_bias: PositionBias | None = None
    asking: Tensor | None = field(default=None, metadata=per_token())
    state: Any = None
    attention: Tensor | None = None
    keys: Tensor | None = None
    drafter_row: Tensor | None = None
    drafter_input: Tensor | None = None
    next_position: Tensor | None = None
    branches: Branches | None = None
    importance: tuple[Tensor, Tensor] | None = None
    num_blended: int = 0
    num_images: int | None = None
    known: Known[TokenCounts] | None = None

    # --- how many -----------------------------------------------------------------------------

    @property
    def counts(self) -> TokenCounts:
        """How many tokens there are, as numbers of the host.

        They are known from the beginning and behind all that drops tokens here. Only where they are
        not, because something else replaced `visual_index` or `valid`, this waits for the device.
        """
        known = self.what_is_known()
        if known.counts is not None and known.counts.images:
            return known.counts
        owner = self.visual_index
        if self.valid is not None:
            owner = torch.where(self.valid, owner, PADDING)
        counts = TokenCounts.of(owner.cpu(), self.num_images or 1)
        self.know(counts, known.hides, known.left)
        return counts

    @property
    def hides_padding(self) -> bool:
        """Whether padding stands before a token; behind all tokens the causal mask hides it."""
        if self.valid is None:
            return False
        known = self.what_is_known()
        if known.hides is not None:
            return known.hides
        hides = hides_tokens(self.valid)
        self.know(known.counts, hides, known.left)
        return hides

    def know(self, counts: TokenCounts | None, hides: bool | None, left: bool = False) -> None:
        """Remembers numbers about the tokens as they are now; see `Known`."""
        self.visual_index, self.valid = counted(self.visual_index), counted(self.valid)
        self.known = Known((self.visual_index, self.valid), counts, hides, left)

    def what_is_known(self) -> Known[TokenCounts]:
        """What was remembered, if the tokens are still those."""
        known = self.known
        if known is not None and known.holds_for(self.visual_index, self.valid):
            return known
        return Known((self.visual_index, self.valid))

    @property
    def most_images(self) -> int:
        """The most images that a row has, at least 1."""
        return self.num_images or len(self.counts.images[0])

    # --- what is there ------------------------------------------------------------------------

    @property
    def is_visual(self) -> Tensor:
        """(B, S) True on image tokens."""
        return self.visual_index >= 0

    @property
    def recorded_rows(self) -> Tensor:
        """`attention` behind a layer that the method's `Probe` names; ValueError elsewhere."""
        return required(
            self.attention,
            f"no attention rows were recorded before layer {self.layer}: name the layer before it "
            "in the `Probe` of the method",
        )

    @property
    def recorded_keys(self) -> Tensor:
        """`keys` behind such a layer, where the `Probe` asks for keys; ValueError elsewhere."""
        return required(
            self.keys,
            f"no keys were recorded before layer {self.layer}: name the layer before it in the "
            "`Probe` of the method, with form='keys'",
        )

    @property
    def key_bias(self) -> Tensor | None:
        """(B, S) fp32 what layers add to the products of all queries with a token's key, before the
        softmax: the extra "key_bias", which a method leaves or changes like any other; None:
        nothing. ValueError when it is something else."""
        bias = self.extras.get(KEY_BIAS)
        if bias is not None and (bias.dtype != torch.float32 or bias.ndim != 2):
            raise ValueError(
                f"extras[{KEY_BIAS!r}] must hold one torch.float32 for each token, not "
                f"{tuple(bias.shape[2:])} of {bias.dtype}"
            )
        return bias

    @property
    def last(self) -> Tensor:
        """(B,) place of the last prompt token of every row."""
        batch, size = self.index.shape
        if self.valid is None or self.what_is_known().left:
            return self.index.new_full((batch,), size - 1)
        return (self.valid * torch.arange(size, device=self.index.device)).amax(dim=1)

    def places(self, flags: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Places (B, most) of the tokens where `flags` (B, S) is True, in order, and which of them
        are real (B, most); the others are the last prompt token, so that they can be probed."""
        order = true_first(flags)[:, :most]
        real = flags.gather(1, order)
        return torch.where(real, order, self.last[:, None]), real

    def images(self) -> tuple[Tensor, Tensor, Tensor]:
        """The visual tokens image by image: row (G, 1), place (G, V) in that row, and real (G, V),
        False on padding. G counts rows x images; V is the most tokens an image has."""
        counts, device = self.counts.images, self.visual_index.device
        most, images = max(map(max, counts)), len(counts[0])
        own = torch.arange(images, device=device)[:, None]
        member = (self.visual_index[:, None] == own).flatten(0, 1)  # (G, S)
        place = true_first(member)[:, :most]
        row = torch.arange(len(counts), device=device)
        return row.repeat_interleave(images)[:, None], place, member.gather(1, place)

    def from_images(self, values: Tensor, row: Tensor, place: Tensor, real: Tensor) -> Tensor:
        """(B, S) `values` (G, V) of the visual tokens, image by image as `images` gives them (row,
        place, real), at the tokens they belong to; 0 on text."""
        # Added: what pads an image with few tokens may be a token of another.
        where, zeros = (row.expand_as(place), place), values.new_zeros(self.index.shape)
        return zeros.index_put(where, values * real, accumulate=True)

    def text_behind(self) -> Tensor:
        """(B, I, S) True on the text behind each image of a row; I is the most images a row has."""
        places = torch.arange(self.index.shape[1], device=self.index.device)
        own = self.own_tokens()
        text = ~self.is_visual if self.valid is None else ~self.is_visual & self.valid
        behind = text[:, None] & (places > (own * places).amax(dim=-1, keepdim=True))
        return behind & own.any(dim=-1, keepdim=True)

    def own_tokens(self) -> Tensor:
        """(B, I, S) True on the tokens of each image of a row."""
        if self.most_images == 1:
            return self.is_visual[:, None]
        numbers = torch.arange(self.most_images, device=self.index.device)
        return self.visual_index[:, None] == numbers[:, None]

    def image_numbers(self, name: str) -> list[list[Any]]:
        """`image_extras[name]` with 0 where a row has no such image, so that rows are as long."""
        rows = self.image_extras[name]
        most = max(self.most_images, *map(len, rows))
        return [[*row, *[0] * (most - len(row))] for row in rows]

    @property
    def has_axes(self) -> bool:
        """Whether positions are places in a picture on several axes, as where images have grids of
        their own."""
        return self.position_ids.ndim == 3

    @property
    def grids(self) -> list[list[tuple[int, int]]]:
        """(h, w) of one crop of every image of every row, before any pruning; (0, 0) where a row
        has no such image."""
        rows, columns = map(self.image_numbers, GRID)
        return [list(zip(*sides, strict=True)) for sides in zip(rows, columns, strict=True)]

    @property
    def frame_pairs(self) -> list[list[int]]:
        """Pairs of frames of every video of every row, each of them a crop; 0 for images."""
        return self.image_numbers(PAIRS)

    def image_values(self, name: str) -> Tensor:
        """(B, I) `image_numbers` on the device."""
        return on_device(self.image_numbers(name), self.index.device)

    def at_tokens(self, values: Tensor) -> Tensor:
        """(B, S) value of the image a token belongs to, from one per image (B, I); text gets that
        of the first image."""
        if values.shape[1] == 1:
            return values.expand(self.index.shape)
        return values.gather(1, self.visual_index.clamp(min=0))

    def attention_rows(self, layer: int, rows: Tensor) -> Tensor:
        """(B, H, R, S) fp32 rows of the attention map that decoder layer `layer` would have on the
        tokens as they are now; rows (B, R) are the places of the queries."""
        bias = self.key_bias
        if self.position_bias is not None:
            bias = self.decoder.attention_bias(self, rows)
        return self.decoder.attention_rows(
            layer, self.hidden_states, self.position_ids, rows, self.valid, bias
        )

    def next_attention(self) -> Tensor:
        """(B, S) fp32 head mean of what the last prompt token attends to in the layer about to
        run."""
        return self.attention_rows(self.layer, self.last[:, None])[:, :, 0].mean(dim=1)

    def record_importance(self, score: Tensor) -> None:
        """Leaves `score` (B, S), what the method thinks of each token, for a trace."""
        self.importance = self.index, score

    # --- fewer tokens -------------------------------------------------------------------------

    def keep(
        self, mask: Tensor, renumber: bool = False, counts: TokenCounts | None = None
    ) -> Prefill:
        """Only the tokens where `mask` (B, S) is True, in their order.

        Rows may keep different counts: shorter ones are padded on the left. Positions stay as they
        are (gaps are legal) unless `renumber`, which counts 0, 1, 2, ... again in every row; those
        of several axes, which are places in a picture, stay in any case, and so do those that
        `position_bias` looks at.
        counts: of the tokens that stay; None: the device is asked, and waited for
        """
        if self.valid is not None:
            mask = mask & self.valid
        if counts is None:
            owner = torch.where(mask, self.visual_index, PADDING)
            counts = TokenCounts.of(owner.cpu(), self.num_images or 1)
        order = true_last(mask)
        order = order[:, mask.shape[1] - counts.longest :]
        valid = None if counts.even else mask.gather(1, order)
        return self.take(order, valid, renumber, counts)

    def hide(self, mask: Tensor, renumber: bool = False) -> Prefill:
        """As `keep`, but what goes becomes padding: the device need not say how much that is, and
        the layers are no faster for it until tokens are kept again."""
        if self.valid is not None:
            mask = mask & self.valid
        order = true_last(mask)
        return self.take(order, mask.gather(1, order), renumber)

    def keep_visual(
        self, score: Tensor, num_keep: int | Tensor | list[list[int]], renumber: bool = False
    ) -> Prefill:
        """Keeps all text and, of every image, `num_keep` tokens with the highest `score` (B, S).

        `num_keep` is one count for all images, one for each image of every row, or a (B, S) count
        looked up at each token, of which the device has to say what it comes to. Equal scores go to
        the earlier token.
        """
        counts = None
        if not isinstance(num_keep, Tensor):
            before = self.counts
            if isinstance(num_keep, int):
                wanted = [[num_keep] * len(row) for row in before.images]
            else:
                wanted, num_keep = num_keep, self.at_tokens(on_device(num_keep, score.device))
            pairs = (zip(*rows, strict=True) for rows in zip(before.images, wanted, strict=True))
            counts = before.with_images([[min(n, max(k, 0)) for n, k in row] for row in pairs])
        rank = rank_within_groups(score, self.visual_index)
        return self.keep(~self.is_visual | (rank < num_keep), renumber, counts)

    def take(
        self,
        order: Tensor,
        valid: Tensor | None,
        renumber: bool = False,
        counts: TokenCounts | None = None,
    ) -> Prefill:
        """The tokens at `order` (B, n), in that order; `valid` (B, n) is False on padding among
        them, which stands on the left. `renumber` and `counts` as in `keep`."""
        kept = replace(
            self,
            **mapped(self, at(order), without=("valid",)),
            valid=valid,
            attention=None,
            keys=None,
            drafter_row=None,
            drafter_input=None,
        )
        if renumber and not self.has_axes and self.position_bias is None:
            if valid is None:
                places = torch.arange(order.shape[1], device=order.device)
                kept.position_ids = places.expand(len(order), -1)
            else:
                kept.position_ids = (valid.cumsum(dim=1) - 1).clamp(min=0)
            kept.next_position = None
        if valid is not None:  # padding belongs to no image
            kept.visual_index = kept.visual_index.masked_fill(~valid, -1)
        kept.know(counts, hides=True, left=True)
        return kept

    # --- new tokens ---------------------------------------------------------------------------

    def keep_and_append(
        self,
        mask: Tensor,
        tokens: Tensor,
        image: Tensor,
        real: Tensor,
        renumber: bool = False,
        counts: TokenCounts | None = None,
    ) -> Prefill:
        """The tokens where `mask` (B, S) is True and, behind those of their image, new ones.

        tokens (B, M, D) blended from several; image (B, M) of the row they belong to, ascending;
        real (B, M) False on padding. Their `index` counts down from -1 over the whole prefill, and
        their `extras` are zeros. counts: as in `keep`, the new tokens included
        """
        if self.valid is not None:
            mask = mask & self.valid
        batch, size = mask.shape
        places = torch.arange(size, device=mask.device).expand(batch, -1)
        ends = places.new_zeros(batch, 1 + self.most_images)  # of the text, and of every image
        ends = ends.scatter_reduce(1, self.visual_index + 1, places, "amax")
        behind = ends.gather(1, image + 1)
        key = torch.cat([places, behind], dim=1)  # of equals the older one comes first
        alive = torch.cat([mask, real], dim=1)
        if counts is None:
            owner = torch.where(alive, torch.cat([self.visual_index, image], dim=1), PADDING)
            counts = TokenCounts.of(owner.cpu(), self.most_images)
        order = key.masked_fill(~alive, -1).argsort(dim=1, stable=True)
        order = order[:, order.shape[1] - counts.longest :]
        valid = None if counts.even else alive.gather(1, order)
        # Those of several axes stand where the last token of their image does.
        positions = at(behind)(self.position_ids, 1)
        grown = self._with(tokens, positions, image)
        return grown.take(order, valid, renumber, counts)

    @property
    def follows(self) -> Tensor:
        """(B,) position of the first token behind the prompt: `next_position` where a method said
        so, else one after the last position."""
        if self.next_position is not None:
            return self.next_position
        places = self.position_ids if not self.has_axes else self.position_ids.amax(dim=2)
        if self.valid is not None:
            places = places.masked_fill(~self.valid, -1)
        return places.amax(dim=1) + 1

    def append(self, tokens: Tensor, branches: Branches | None = None) -> Prefill:
        """New tokens (B, M, D) behind every prompt, at the positions that follow it, or, with
        `branches`, as a tree whose root is the last token of the prompt.

        They are no part of the prompt: their `index` counts down from -1 as in `keep_and_append`,
        and generation continues at the position it would have without them.
        """
        batch, count = tokens.shape[:2]
        known = self.what_is_known().counts
        none = self.index.new_full((batch, count), -1)
        follows = self.follows
        if branches is None:
            ahead = torch.arange(count, device=none.device)
        else:
            ahead = branches.depths.to(none.device) - 1
        positions = follows[:, None] + ahead
        if self.has_axes:
            positions = positions[..., None].expand(-1, -1, self.position_ids.shape[2])
        grown = self._with(tokens, positions, none)
        if self.valid is not None:
            real = torch.ones_like(none, dtype=torch.bool)
            grown.valid = torch.cat([self.valid, real], dim=1)
        grown.next_position, grown.branches = follows, branches
        grown.know(None if known is None else known.with_text(count), hides=True)
        return grown

    def _with(self, tokens: Tensor, positions: Tensor, image: Tensor) -> Prefill:
        """New tokens (B, M, D) at the end, `valid` not yet adjusted; image: (B, M), positions as
        in `position_ids`."""
        batch, count = image.shape
        first = -1 - self.num_blended
        index = torch.arange(first, first - count, -1, device=image.device).expand(batch, -1)
        return replace(
            self,
            hidden_states=torch.cat([self.hidden_states, tokens.to(self.hidden_states)], dim=1),
            position_ids=torch.cat([self.position_ids, positions], dim=1),
            visual_index=torch.cat([self.visual_index, image], dim=1),
            patch_index=F.pad(self.patch_index, (0, count), value=-1),
            index=torch.cat([self.index, index], dim=1),
            extras=each(self.extras, with_zeros(count)),
            asking=self._asking_with(image),
            attention=None,
            keys=None,
            drafter_row=None,
            drafter_input=None,
            num_blended=self.num_blended + count,
        )

    def _asking_with(self, image: Tensor) -> Tensor | None:
        """`asking` with new tokens at the end, of images (B, M) or, at -1, of what follows."""
        if self.asking is None:
            return None
        own = self.asking[:, :1].expand_as(image)
        if self.position_bias is not None and not self.position_bias.answers:
            own = own & (image >= 0)
        return torch.cat([self.asking, own], dim=1)
