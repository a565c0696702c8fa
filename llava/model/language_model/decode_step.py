"""A step of decoding: layers on the tokens that follow those which their caches hold.

`DecodeStep` runs layer by layer on exactly the keys that are there; `compiled_step.CompiledStep`
gives the same numbers by graphs. The norm and the head behind the last layer may belong to a step
(`Ending`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ...devices import device_of, moved
from ...pruning.branches import Branches
from ..kv_cache import KVCache, RowState
from .attention import attention_mask, branch_mask, causal_mask, padded_causal_mask
from .layers import DecoderLayer, OwnCache, Rotary, Step, bring, is_watched

#: most tokens of a step whose norm and head are part of its graph, which may keep all the logits
FEW_TOKENS = 16


class Asked(Protocol):
    """Tokens x (1, q, D) of one answer, its cache, and how they follow each other in a tree."""

    x: Tensor
    cache: KVCache
    branches: Branches | None


@dataclass(frozen=True)
class Ending:
    """What makes logits of what leaves the last layer.

    norm, head: the modules; each may be on a device of its own
    last:       of the newest token alone
    """

    norm: nn.Module
    head: nn.Module
    last: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """fp32 logits (B, q, V), with `last` (B, 1, V), of x (B, q, D); on the head's device."""
        x = self.norm(self.asked(x).to(device_of(self.norm)))
        return self.head(x.to(device_of(self.head))).float()

    def here(self, x: Tensor) -> Tensor:
        """The same where both modules are on the device of x."""
        return self.head(self.norm(self.asked(x))).float()

    def asked(self, x: Tensor) -> Tensor:
        # A slice with gaps would make the product copy the whole head first.
        return x[:, -1:].contiguous() if self.last else x

    def fits(self, x: Tensor) -> bool:
        """Whether it may be part of a graph on x (B, q, D): these are few tokens, nobody watches
        its parts, and they are made of no others, as an adapter is, which may be watched or
        switched off by themselves."""
        parts = self.norm, self.head
        whole = all(next(part.children(), None) is None for part in parts)
        here = all(device_of(part) == x.device and not is_watched(part) for part in parts)
        return x.shape[1] <= FEW_TOKENS and whole and here

    def addresses(self) -> list[int]:
        """Where the weights are."""
        return [own.data_ptr() for part in (self.norm, self.head) for own in part.parameters()]


class DecodeStep:
    """Runs layers as they are.

    rotary: of the decoder
    backend: of its attention
    """

    def __init__(self, rotary: Rotary, backend: str):
        self.rotary, self.backend = rotary, backend

    def __call__(
        self,
        layers: Iterable[DecoderLayer],
        x: Tensor,
        cache: KVCache,
        collect: list[Tensor] | None = None,
        trace=None,
        branches: Branches | None = None,
        ending: Ending | None = None,
        most: int = 0,
    ) -> Tensor:
        """What `layers`, and `ending` behind them, give on the (B, q, D) tokens x that follow those
        in the cache, on the device of the last module; the cache holds x afterwards.

        collect: takes the input of every layer. trace: takes the attention rows that it records.
        branches: of the tokens, where they are nodes of a tree
        most:     tokens that x may have in other steps like this one. Compiled steps are made as
                  long as that, so that one graph serves them all. 0: x is taken as it is
        """
        recorded = frozenset() if trace is None else trace.attention_layers
        steps: dict[int, Step] = {}  # layers that hold the same tokens share one
        for layer in layers:
            number = layer.self_attn.layer_idx
            state = cache.state_of(number)
            if id(state) not in steps:
                steps[id(state)] = self._step(state, cache, number, x, branches)
            x, step = bring(layer, x, steps[id(state)])
            steps[id(state)] = step
            if collect is not None:
                collect.append(x)
            if number in recorded:
                step = self._with_rows(step, state, cache.lengths[number], x)
            x, rows = layer(x, step, cache)
            if number in recorded:
                trace.add_answer_attention(number, rows)
        return x if ending is None else ending(x)

    def both(
        self,
        layers: Iterable[DecoderLayer],
        further: Iterable[DecoderLayer],
        x: Tensor,
        cache: KVCache,
        ending: Ending,
    ) -> tuple[Tensor, Tensor]:
        """What `layers` give on the (B, q, D) tokens x, and what `further` ones, which hold the
        same tokens, and `ending` make of that."""
        between = self(layers, x, cache)
        return between, self(further, between, cache, ending=ending)

    def several(self, layers: Iterable[DecoderLayer], asked: Sequence[Asked]) -> list[Tensor]:
        """What `layers` give on the tokens of several answers, each as by itself, (1, q, D); every
        layer multiplies all of them with its weights at once. Layer by layer in a compiled step,
        too: what is compiled is one cache."""
        x = torch.cat([own.x for own in asked], dim=1)
        steps: dict[tuple[int, ...], Step] = {}
        for layer in layers:
            number = layer.self_attn.layer_idx
            key = tuple(id(own.cache.rows[number]) for own in asked)
            if key not in steps:
                steps[key] = self._joint_step(asked, number)
            x, steps[key] = bring(layer, x, steps[key])
            x, _ = layer(x, steps[key], None)
        return list(x.split([own.x.shape[1] for own in asked], dim=1))

    def _joint_step(self, asked: Sequence[Asked], number: int) -> Step:
        """For layers that hold what layer `number` does."""
        steps = [
            self._step(own.cache.state_of(number), own.cache, number, own.x, own.branches)
            for own in asked
        ]
        cos, sin = (torch.cat(parts, dim=2) for parts in zip(*(s.rope for s in steps), strict=True))
        answers = [
            OwnCache(own.x.shape[1], own.cache, step.mask)
            for own, step in zip(asked, steps, strict=True)
        ]
        return Step((cos, sin), answers=answers)

    def _step(
        self, state: RowState, cache: KVCache, number: int, x: Tensor, branches: Branches | None
    ) -> Step:
        """For layers that hold what layer `number` does."""
        count, held = x.shape[1], cache.lengths[number]
        if branches is not None:
            return self._branching(state, held + count, x.dtype, branches)
        rope = state.rope(self.rotary, held - state.size, count, x.dtype)
        valid = state.mask(held + count)
        bias = state.attention_bias(self.rotary, held, held + count)
        if valid is not None:
            mask = padded_causal_mask(valid, count)
        elif bias is not None or count == 1 or self.backend == "flash_attention_2":
            mask = None  # FlashAttention aligns queries with the last keys by itself
        else:
            mask = causal_mask(count, held + count, state.next_position.device)
        return Step(rope, attention_mask(mask, bias, count, x.dtype))

    def _branching(
        self, state: RowState, length: int, dtype: torch.dtype, branches: Branches
    ) -> Step:
        """For nodes of a tree that are the last of `length` tokens; FlashAttention knows no such
        mask, so that they run on sdpa under it."""
        own = moved(branches, state.next_position.device)
        path = state.rope(self.rotary, own.root, own.deepest + 1, dtype)
        cos, sin = (part.index_select(2, own.depths[-len(own) :]) for part in path)
        bias = state.attention_bias(self.rotary, length - len(own), length, own)
        return Step((cos, sin), branch_mask(own.visible, length, state.mask(length), bias, dtype))

    def _with_rows(self, step: Step, state: RowState, held: int, x: Tensor) -> Step:
        """The same for a layer that holds `held` tokens and records what those behind them, x
        (B, q, D), attend to."""
        length = held + x.shape[1]
        rows = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        bias = state.attention_bias(self.rotary, held, length)
        return replace(step, rows=rows, valid=state.mask(length), bias=bias)
