"""What a pruning method really kept: recorded by the model while it runs, read afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cost import DecoderShape, kv_cache_bytes, prefill_flops
from .interfaces import LanguageModel
from .required import required
from .tokens import ImageTokens


@dataclass
class PruningTrace:
    """Record of the prefills inside `with trace_pruning(model) as trace:`.

    visual_positions: one tensor per image: row-major patch index (crop * N + patch) of every visual
                      token that enters the decoder; -1 on merged and newline tokens
    visual_embeds:    one (n, D) tensor per image, only with `trace_pruning(model, embeds=True)`
    unpruned_lengths: per image the tokens it has without a method
    grids:            per image the (h, w) grid of each of its crops that positions count in
    The other fields describe the latest prefill:
    position_ids:     (B, S) positions seen by RoPE; (B, S, A) where they have A axes
    decoder_keep:     layer -> one index tensor per row into the prompt that entered layer 0, for
                      every layer where the set of tokens changed
    visual_tokens:    per decoder layer a (B,) tensor: visual tokens entering it
    prompt_tokens:    per decoder layer a (B,) tensor: all tokens entering it
    kv_lengths:       per decoder layer a (B,) tensor: valid cache entries after prefill
    importance:       per image a tensor aligned with its visual tokens (NaN: not judged): what the
                      method thought of them; None where it records nothing
    attention:        decoder layer -> (B, H, S) fp32: what the last prompt token, which the first
                      token of the answer follows from, attends to there, over the prompt that
                      entered layer 0; 0 on padding and dropped tokens. Only for the layers of
                      `trace_pruning(model, attention=[...])`
    answer_attention: decoder layer -> the same for every answer token after which another followed,
                      in order, without what it attends to among the answer
    visual_index:     (B, S) which image of the row a token of that prompt belongs to, -1 on text
    """

    keep_embeds: bool = False
    attention_layers: frozenset[int] = frozenset()
    visual_positions: list[Tensor] = field(default_factory=list)
    unpruned_lengths: list[int] = field(default_factory=list)
    grids: list[tuple[int, int]] = field(default_factory=list)
    visual_embeds: list[Tensor] = field(default_factory=list)
    position_ids: Tensor | None = None
    decoder_keep: dict[int, list[Tensor]] = field(default_factory=dict)
    visual_tokens: list[Tensor] = field(default_factory=list)
    prompt_tokens: list[Tensor] = field(default_factory=list)
    kv_lengths: list[Tensor] = field(default_factory=list)
    importance: list[Tensor] | None = None
    attention: dict[int, Tensor] = field(default_factory=dict)
    answer_attention: dict[int, list[Tensor]] = field(default_factory=dict)
    held: dict[int, Tensor] = field(default_factory=dict)
    visual_index: Tensor | None = None
    shape: DecoderShape | None = None
    cache_bytes: int = 0

    @property
    def prompt_size(self) -> int:
        """S, tokens of the longest prompt of the latest prefill; ValueError before the first."""
        return required(self.position_ids, "no prompt ran while this trace was on").shape[1]

    @property
    def flops(self) -> float:
        """Floating-point operations of the decoder layers in the latest prefill, summed over rows;
        formula in `llava.pruning.cost.prefill_flops`."""
        if (shape := self.shape) is None:  # there was no prefill
            return 0
        rows = zip(*(tokens.tolist() for tokens in self.prompt_tokens), strict=True)
        return sum(prefill_flops(shape, row) for row in rows)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the valid cache entries after the latest prefill, from the tensors' own sizes;
        without a cache (`use_cache=False`) what one would have held."""
        if self.cache_bytes or (shape := self.shape) is None:
            return self.cache_bytes
        return sum(kv_cache_bytes(shape, int(t.sum())) for t in self.prompt_tokens)

    def add_image(self, image: ImageTokens) -> None:
        """An image as it enters the decoder."""
        self.visual_positions.append(image.patches.detach().cpu())
        self.unpruned_lengths.append(image.length)
        self.grids.append(image.crop_grid)
        if self.keep_embeds:
            self.visual_embeds.append(image.embeds.detach().cpu())

    def start_prefill(self, shape: DecoderShape, position_ids: Tensor) -> None:
        self.shape, self.position_ids = shape, position_ids.detach().cpu()
        self.decoder_keep, self.visual_tokens, self.prompt_tokens = {}, [], []
        self.kv_lengths, self.cache_bytes, self.importance = [], 0, None
        self.attention, self.visual_index = {}, None
        self.answer_attention, self.held = {}, {}

    def add_layer(self, visual_index: Tensor, valid: Tensor | None, size: Tensor) -> None:
        """One layer of the prefill; `size` (B, S) only lends its shape and device."""
        tokens = size.new_ones(size.shape, dtype=torch.bool) if valid is None else valid
        self.prompt_tokens.append(tokens.sum(dim=1))
        self.visual_tokens.append((tokens & (visual_index >= 0)).sum(dim=1))

    def add_attention(self, layer: int, row: Tensor, index: Tensor) -> None:
        """row (B, H, S') of the tokens that stood at `index` (B, S') in the prompt of layer 0;
        what tokens blended inside the decoder (negative places) are paid is left out."""
        self.attention[layer] = self._over_prompt(row, index)

    def hold(self, layers: Iterable[int], index: Tensor, valid: Tensor | None) -> None:
        """The caches of `layers` hold the tokens that stood at `index` (B, n) in that prompt."""
        for layer in self.attention_layers.intersection(layers):
            self.held[layer] = index if valid is None else index.masked_fill(~valid, -1)

    def add_answer_attention(self, layer: int, rows: Tensor) -> None:
        """rows (B, H, q, K) of the next q tokens of the answer over all that a cache holds."""
        index = self.held[layer].to(rows.device)
        seen = rows[..., : index.shape[1]]
        found = self.answer_attention.setdefault(layer, [])
        found += [self._over_prompt(seen[:, :, n], index) for n in range(seen.shape[2])]

    def _over_prompt(self, row: Tensor, index: Tensor) -> Tensor:
        size = self.prompt_size
        places = torch.where(index < 0, size, index)[:, None].expand_as(row)
        whole = row.new_zeros(*row.shape[:2], size + 1)  # padding adds its zeros somewhere
        return whole.scatter_add_(2, places, row)[..., :size].detach().cpu()

    def image_attention(self, layer: int) -> list[Tensor]:
        """Of `attention` in one layer what goes to each image: (H, n) aligned with the entries of
        `visual_positions`, image after image of all prompts."""
        return self._of_images(self.attention[layer])

    def answer_image_attention(self, layer: int) -> list[list[Tensor]]:
        """As `image_attention`, for every token of the answer: what the token that it follows from
        attends to. The first follows from the last prompt token."""
        rows = [self.attention[layer], *self.answer_attention.get(layer, [])]
        return list(map(self._of_images, rows))

    def _of_images(self, rows: Tensor) -> list[Tensor]:
        found = []
        owners: Any = self.visual_index  # there with `attention_layers`
        for row, owner in zip(rows, owners, strict=True):
            found += [row[:, owner == image] for image in range(int(owner.amax()) + 1)]
        return found

    def add_change(self, layer: int, index: Tensor, valid: Tensor | None) -> None:
        rows = index if valid is None else [row[ok] for row, ok in zip(index, valid, strict=True)]
        self.decoder_keep[layer] = [row.detach().cpu() for row in rows]

    def take_rows(self, rows: list[PruningTrace]) -> None:
        """Describes a batch whose prompts ran one after the other, from the traces of those."""
        self.shape = rows[0].shape
        for name in ("visual_tokens", "prompt_tokens", "kv_lengths"):
            layers = zip(*(getattr(row, name) for row in rows), strict=True)
            setattr(self, name, [torch.cat(layer) for layer in layers])
        self.cache_bytes = sum(row.cache_bytes for row in rows)
        self.importance = [image for row in rows for image in row.importance or []] or None
        positions = [row.position_ids for row in rows if row.position_ids is not None]
        size = max(p.shape[1] for p in positions)
        missing = [size - p.shape[1] for p in positions]  # padded on the left
        self.position_ids = torch.cat(
            [
                F.pad(p, (0, 0) * (p.ndim - 2) + (n, 0))
                for p, n in zip(positions, missing, strict=True)
            ]
        )
        kept = [torch.arange(n, size) for n in missing]
        for layer in sorted({layer for row in rows for layer in row.decoder_keep}):
            for number, (row, n) in enumerate(zip(rows, missing, strict=True)):
                if layer in row.decoder_keep:
                    own = row.decoder_keep[layer][0]
                    kept[number] = torch.where(own < 0, own, own + n)
            self.decoder_keep[layer] = list(kept)

    def finish_prefill(
        self, cache: Any, visual_index: Tensor, judged: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """visual_index (B, S) of the prompt; judged: what `Prefill.record_importance` left."""
        # Brought over together: a wait for the device in every layer would slow the prefill down.
        device = self.prompt_tokens[-1].device  # layers may run on several
        counts = torch.stack([t.to(device) for t in (*self.prompt_tokens, *self.visual_tokens)])
        counts = counts.cpu()
        self.prompt_tokens, self.visual_tokens = map(list, counts.chunk(2))
        if cache is not None:
            self.kv_lengths = cache.row_lengths()
            self.cache_bytes = cache.num_bytes()
        if judged is not None:
            visual = visual_index.to(judged[0].device)
            self.importance = importance_per_image(*judged, visual)
        if self.attention_layers:
            self.visual_index = visual_index.cpu()


def importance_per_image(index: Tensor, score: Tensor, visual_index: Tensor) -> list[Tensor]:
    """Scores (B, n) of the tokens that stood at `index` (B, n), image after image of all rows."""
    images = []
    for row, places in enumerate(index):
        known = places >= 0
        full = torch.full(visual_index.shape[1:], float("nan"), device=score.device)
        full[places[known]] = score[row, known].float()
        count = int(visual_index[row].amax()) + 1
        images += [full[visual_index[row] == image].cpu() for image in range(count)]
    return images


@contextmanager
def trace_pruning(
    model: LanguageModel, embeds: bool = False, attention: Iterable[int] = ()
) -> Iterator[PruningTrace]:
    """Records what the calls of `model` inside the block keep, see `PruningTrace`.

    embeds:    also keep the embeddings of the visual tokens
    attention: decoder layers of which the attention of the last prompt token and of the answer's
               tokens is recorded, one row for each, with any method and attention backend; negative
               numbers count from the last layer
    Raises ValueError for a layer that the decoder does not have.
    """
    depth = model.config.num_hidden_layers
    layers = list(attention)
    if wrong := [layer for layer in layers if not -depth <= layer < depth]:
        raise ValueError(
            f"attention layer {wrong[0]} is not one of the {depth} decoder layers, 0 to {depth - 1}"
        )
    own = PruningTrace(embeds, frozenset(layer % depth for layer in layers))
    outer, model.pruning_trace = model.pruning_trace, own
    try:
        yield own
    finally:
        model.pruning_trace = outer
