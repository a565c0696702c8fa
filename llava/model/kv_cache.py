"""Key/value cache of the decoder: preallocated, every layer with its own length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..pruning.branches import Branches
from .position_bias import Directions, between, joined

#: compiled steps see so many places of a cache, or a multiple of them
BUCKET = 64
#: angles of so many tokens of an answer are computed at a time
AHEAD = 256
#: tokens still to come that get places ahead of time: most answers end long before their limit
MOST_RESERVED = 512


@dataclass
class RowState:
    """The prompts of a batch as a group of layers sees them, shared by layers with the same tokens;
    it stays as it is while answers grow.

    next_position: (B,) position of the first token of the answer
    size:          places of the prompt in the caches of these layers
    valid:         (B, n) False on the padding of the prompt, its first n places; later tokens are
                   always real. None: no padding
    bias:          (B, m) fp32 what is added to attention to the first m places, 0 for later ones;
                   None: nothing
    directions:    where the first places stand, at least those of the prompt, for a bias by
                   position; None: there is none
    """

    next_position: Tensor
    size: int
    valid: Tensor | None = None
    bias: Tensor | None = None
    directions: Directions | None = None
    _rope: tuple[int, Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    _size: tuple[int, Tensor] | None = field(default=None, init=False, repr=False)

    def rope(self, rotary: Callable, start: int, count: int, dtype) -> tuple[Tensor, Tensor]:
        """`rope_of` the `count` tokens of the answer from `start` on, (B, 1, count, d) each."""
        known = self._rope
        if known is None or not known[0] <= start <= known[0] + known[1].shape[2] - count:
            stop = start + max(count, AHEAD)
            with torch.inference_mode(False):  # they outlive the mode
                places = torch.arange(start, stop, device=self.next_position.device)
                self._rope = known = start, *rotary(self.next_position[:, None] + places, dtype)
        first, cos, sin = known
        at = slice(start - first, start - first + count)
        return cos[:, :, at], sin[:, :, at]

    def size_as_tensor(self) -> Tensor:
        """() `size`, where the positions are."""
        if self._size is None or self._size[0] != self.size:
            self._size = self.size, torch.tensor(self.size, device=self.next_position.device)
        return self._size[1]

    def mask(self, length: int) -> Tensor | None:
        """(B, length) True where a token is; None: everywhere."""
        self.valid = _reaching(self.valid, length, True)
        return None if self.valid is None else self.valid[:, :length]

    def key_bias(self, length: int) -> Tensor | None:
        """(B, length) what is added to attention to each place; None: nothing."""
        self.bias = _reaching(self.bias, length, 0.0)
        return None if self.bias is None else self.bias[:, :length]

    def directions_of(self, rotary, length: int) -> Tensor | None:
        """(B, length, d) `Rotary.directions` of the first places; None: nobody needs them."""
        if self.directions is None:
            return None
        known = self.directions.known
        if length > (first := known.shape[1]):
            later = torch.arange(first, length + AHEAD, device=known.device) - self.size
            more = rotary.directions(self.next_position[:, None] + later)
            self.directions.known = known = torch.cat([known, more], dim=1)
        return known[:, :length]

    def attention_bias(
        self, rotary, start: int, length: int, branches: Branches | None = None
    ) -> Tensor | None:
        """What tokens of the answer, at the places from `start` to `length`, add to attention to
        all those before `length`: (B, length) where it is the same for all of them, else
        (B, length - start, length); None: nothing. branches: of those tokens, if they are nodes"""
        of_keys, places = self.key_bias(length), self.directions_of(rotary, length)
        own = self.directions
        if own is None or places is None:
            return of_keys
        if branches is not None:  # places of tokens one behind the other at the same positions
            at = self.size + branches.root + branches.depths
            places = torch.cat([places[:, : length - len(at)], places.index_select(1, at)], dim=1)
        return joined(of_keys, between(own.function, places[:, start:], places, own.asking))

    def select(self, rows: Tensor) -> None:
        """Reorders the batch."""
        self._rope = None
        self.next_position = self.next_position.index_select(0, rows)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, rows)
        if self.bias is not None:
            self.bias = self.bias.index_select(0, rows)
        if self.directions is not None:
            self.directions = self.directions.rows(rows)


class KVCache:
    """Keys and values of every layer for a batch of B rows, those of G key heads.

    The prompt's keys and values are held as they come, without a copy. The first append after them
    moves a layer to a buffer with free places for the tokens still to come, `MOST_RESERVED` of them
    at most; later appends write in place. A buffer that runs full grows by half its size. Layers
    may hold different numbers of tokens, and rows may have holes (padding). What all rows begin
    with may be held once (`share`); lengths and entries of a layer are then those behind it.

    reserve: tokens that may be appended after the prompt (`max_new_tokens`)
    beams:   rows, one behind the other, that have the same prompt; `reorder_cache` stays among them
    """

    def __init__(self, num_layers: int, reserve: int = 64, beams: int = 1):
        self.reserve, self.beams = reserve, beams
        self.lengths = [0] * num_layers
        self.rows: list[RowState | None] = [None] * num_layers
        self._keys: list[Tensor | None] = [None] * num_layers  # (B, G, capacity, d)
        self._values: list[Tensor | None] = [None] * num_layers
        self._owned = [False] * num_layers  # whether a layer has a buffer to write to
        self._claimed = [False] * num_layers  # whether that is one of `claim`
        #: per layer keys and values (G, P, d) each, and the keys' bias (P,) or None
        self.shared: list[tuple[Tensor, Tensor, Tensor | None] | None] = [None] * num_layers

    def __len__(self) -> int:
        """Places used in layer 0, holes included."""
        return self.lengths[0]

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """`entries` of a layer, where transformers has them as well: `past_key_values[0][0]`."""
        return self.entries(layer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Places used in a layer, as caches of transformers are asked for them."""
        return self.lengths[layer_idx]

    def share(self, layer: int, keys: Tensor, values: Tensor, bias: Tensor | None = None) -> None:
        """Keys and values (G, P, d) that every row of an empty layer begins with, and what is added
        to attention to those keys, (P,) or nothing."""
        self.shared[layer] = keys, values, bias

    def shared_by(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """What `share` was given for a layer."""
        return self.shared[layer]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, G, q, d) keys and values; returns all of the layer's, (B, G, length, d)."""
        start = self.lengths[layer]
        stop = start + keys.shape[2]
        all_keys, all_values = self._keys[layer], self._values[layer]
        if all_keys is None or all_values is None:
            self._keys[layer], self._values[layer] = keys, values
            self.lengths[layer] = stop
            return keys, values
        if not self._owned[layer]:
            wanted = min(start + self.reserve, stop + MOST_RESERVED)
            all_keys, all_values = self._move(layer, max(stop, wanted))
        elif stop > (capacity := all_keys.shape[2]):
            all_keys, all_values = self._move(layer, max(stop, capacity * 3 // 2))
        all_keys[:, :, start:stop] = keys
        all_values[:, :, start:stop] = values
        self.lengths[layer] = stop
        return all_keys[:, :, :stop], all_values[:, :, :stop]

    def claim(
        self, layer: int, count: int, allocate: Callable | None = None
    ) -> tuple[Tensor, Tensor]:
        """For `count` further tokens, which the caller writes: the buffers (B, G, capacity, d) of a
        layer that holds some, of which a step sees the first `window` places.

        allocate: makes both buffers, zeros, where new ones are needed: (cache, layer, capacity) ->
        keys and values; they have places for all tokens still to come, so that they stay
        """
        start, (keys, values) = self.lengths[layer], self._buffers(layer)
        wanted = self.window(layer, count)
        if not self._claimed[layer] or wanted >= keys.shape[2]:
            ahead = self.reserve if allocate else min(self.reserve, MOST_RESERVED)
            wanted = max(wanted, in_buckets(start + ahead))
            # One bucket more than is ever seen: sizes that are never equal compile only once.
            keys, values = self._move(layer, wanted + BUCKET, allocate or _cleared)
        self.lengths[layer] = start + count
        return keys, values

    def window(self, layer: int, count: int = 0) -> int:
        """Places of a layer that a step of `count` tokens sees, a multiple of `BUCKET`."""
        return in_buckets(self.lengths[layer] + count)

    def appended(self, layer: int) -> int:
        """Tokens that a layer holds behind the prompt."""
        return self.lengths[layer] - self.state_of(layer).size

    def state_of(self, layer: int) -> RowState:
        """The prompts as a layer sees them; ValueError where it has not seen them yet."""
        if (state := self.rows[layer]) is None:
            raise ValueError(f"no prompt has run through layer {layer}")
        return state

    def states(self) -> list[RowState]:
        """The states of all layers that have one, each of them once."""
        return list({id(state): state for state in self.rows if state is not None}.values())

    def entries(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer that holds some, (B, G, length, d) each."""
        length, (keys, values) = self.lengths[layer], self._buffers(layer)
        return keys[:, :, :length], values[:, :, :length]

    def keep(self, layer: int, order: Tensor, state: RowState) -> None:
        """Keeps the entries at `order` (B, n) of one layer; `state` describes the result."""
        keys, values = self._buffers(layer)
        room = min(self.reserve, MOST_RESERVED)
        self._keys[layer] = _taken(keys, order, room)
        self._values[layer] = _taken(values, order, room)
        self._owned[layer], self._claimed[layer] = True, False
        self.lengths[layer], self.rows[layer] = order.shape[1], state

    def crop(self, layer: int, length: int) -> None:
        """Forgets what was appended to a layer beyond `length` entries (no copy)."""
        self.lengths[layer] = min(self.lengths[layer], length)

    def keep_of_newest(self, first: list[int], places: list[int]) -> None:
        """Of what layers hold from their places `first` on, one for each of the first layers, keeps
        the entries at `places` behind those, which ascend, and forgets the others."""
        by_device: dict[torch.device, list[tuple[Tensor, int]]] = {}
        for layer, start in enumerate(first):
            for buffer in self._buffers(layer):
                by_device.setdefault(buffer.device, []).append((buffer, start))
        for there, here in enumerate(places):
            if here == there:
                continue
            for buffers in by_device.values():  # at once: a kernel for each layer were many
                torch._foreach_copy_(
                    [buffer[:, :, start + there] for buffer, start in buffers],
                    [buffer[:, :, start + here] for buffer, start in buffers],
                )
        for layer, start in enumerate(first):
            self.crop(layer, start + len(places))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order `beam_idx`, as beam search asks for. Beams of one prompt differ behind
        it alone, so nothing else is moved, and buffers stay where they are."""
        if self.beams > 1:
            for layer, state in enumerate(self.rows):
                if state is not None and self.lengths[layer] > state.size:
                    for buffer in self._buffers(layer):
                        answer = buffer[:, :, state.size : self.lengths[layer]]
                        answer.copy_(answer.index_select(0, beam_idx.to(buffer.device)))
            return
        for buffers in (self._keys, self._values):
            for layer, held in enumerate(buffers):
                if held is not None:
                    buffers[layer] = held.index_select(0, beam_idx.to(held.device))
        for state in self.states():
            state.select(beam_idx.to(state.next_position.device))

    def row_lengths(self) -> list[Tensor]:
        """Per layer a (B,) tensor: tokens that a row sees, holes not counted."""
        lengths = []
        for layer, length in enumerate(self.lengths):
            state, shared = self.rows[layer], self.shared[layer]
            mask = None if state is None else state.mask(length)
            keys = self._keys[layer]
            batch = 0 if keys is None else keys.shape[0]
            full = torch.full((batch,), length)
            own = full if mask is None else mask.sum(dim=1).cpu()
            lengths.append(own if shared is None else own + shared[0].shape[1])
        return lengths

    def num_bytes(self) -> int:
        """Bytes of the keys and values that belong to tokens, from the tensors' element sizes; what
        rows share counts for each of them."""
        total = 0
        for layer, tokens in enumerate(self.row_lengths()):
            for buffer in (self._keys[layer], self._values[layer]):
                if buffer is not None:
                    _, heads, _, width = buffer.shape
                    total += int(tokens.sum()) * heads * width * buffer.element_size()
        return total

    def _buffers(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (B, G, capacity, d) each; ValueError where it holds none."""
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            raise ValueError(f"layer {layer} holds no tokens")
        return keys, values

    def _move(
        self, layer: int, capacity: int, allocate: Callable | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values in new buffers, which come back."""
        used, old = self.lengths[layer], self._buffers(layer)
        if allocate is None:
            new = [_allocate(buffer, capacity) for buffer in old]
        else:
            new = allocate(self, layer, capacity)
        for there, here in zip(new, old, strict=True):
            there[:, :, :used] = here[:, :, :used]
        self._keys[layer], self._values[layer] = keys, values = new
        self._owned[layer], self._claimed[layer] = True, allocate is not None
        return keys, values


def holds_tokens(cache) -> bool:
    """Whether `past_key_values` holds tokens; ValueError when it is no `KVCache` (or None)."""
    if cache is not None and not isinstance(cache, KVCache):
        raise ValueError(
            f"past_key_values must be a llava.model.kv_cache.KVCache, such as the output of an "
            f"earlier call has, not a {type(cache).__name__}"
        )
    return cache is not None and len(cache) > 0


def _reaching(values: Tensor | None, length: int, later: bool | float) -> Tensor | None:
    """`values` (B, n) with at least `length` places, those of new ones being `later`."""
    if values is None or length <= values.shape[1]:
        return values
    # Doubling keeps the number of copies logarithmic in the length of the answer.
    return torch.cat([values, values.new_full((values.shape[0], length), later)], dim=1)


def in_buckets(places: int) -> int:
    """The next multiple of `BUCKET`."""
    return -(-places // BUCKET) * BUCKET


def _allocate(like: Tensor, capacity: int) -> Tensor:
    batch, heads, _, width = like.shape
    with torch.inference_mode(False):  # written to outside of that mode as well
        return like.new_empty(batch, heads, capacity, width)


def _taken(entries: Tensor, order: Tensor, room: int) -> Tensor:
    """A buffer with the `entries` (B, G, S, d) at `order` (B, n), and free places behind them."""
    count, (_, heads, _, width) = order.shape[1], entries.shape
    made = _allocate(entries, count + room)
    index = order[:, None, :, None].expand(-1, heads, -1, width)
    if entries.requires_grad:
        made[:, :, :count] = entries.gather(2, index)
    else:
        torch.gather(entries, 2, index, out=made[:, :, :count])
    return made


def _cleared(cache: KVCache, layer: int, capacity: int) -> list[Tensor]:
    """Buffers of which places are seen that nothing was written to: masked ones are multiplied by
    0, which is no help where they hold NaN."""
    return [_allocate(buffer, capacity).zero_() for buffer in cache.entries(layer)]
