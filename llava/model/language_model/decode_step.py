"""A step of decoding: layers on the tokens that follow those which their caches hold.

Both kinds give the same numbers. `DecodeStep` runs layer by layer on exactly the keys that are
there. `CompiledStep` looks at a whole bucket of places of each cache and masks those that are free,
so that nothing in it but the contents of tensors changes from token to token. The norm and the head
behind the last layer may belong to a step (`Ending`); those of trees run after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ...devices import device_of, moved
from ...pruning.branches import Branches
from ...pruning.position_bias import PositionBias
from ..kv_cache import KVCache, RowState
from ..position_bias import between, joined
from .attention import attention_mask, branch_mask, causal_mask, padded_causal_mask
from .compiling import by_itself, compiled
from .layers import DecoderLayer, OwnCache, Rotary, Step, bring, is_watched

#: decoders up to so many layers are compiled as a whole on a CPU, as calling six small graphs costs
#: more there than what they save; deeper ones layer by layer, as all layers share one graph (but
#: for the last, which has the norm and the head in its graph)
FEW_LAYERS = 12
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


class CompiledStep(DecodeStep):
    """The same, compiled. What it cannot do runs as before: layers on several devices or under
    hooks, inputs of layers and attention rows that are wanted, and gradients."""

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
        layers = list(layers)
        watched = collect is not None or (trace is not None and trace.attention_layers)
        able = layers and all(runs_on(layer, x) for layer in layers)
        if watched or not able or torch.is_grad_enabled():
            return super().__call__(layers, x, cache, collect, trace, branches, ending)
        fixed = most > 0 and branches is None
        more = max(0, most - x.shape[1]) if fixed else 0
        if more:  # behind the tokens, so that these do not see it
            x = torch.cat([x, x[:, -1:].expand(-1, more, -1)], dim=1)
        within = None
        if ending is not None and ending.fits(x) and not (more and ending.last):
            within = ending
        out = self.run(self.plan(layers, x, cache, branches, within, fixed))
        if more:
            for layer in layers:
                number = layer.self_attn.layer_idx
                cache.crop(number, cache.lengths[number] - more)
            out = out[:, :-more]
        return out if ending is None or ending is within else ending(out)

    def plan(
        self,
        layers: list[DecoderLayer],
        x: Tensor,
        cache: KVCache,
        branches: Branches | None = None,
        ending: Ending | None = None,
        fixed: bool = False,
    ) -> Plan:
        """The step of `layers` on x; the cache counts its tokens as held from here on."""
        numbers, count = [layer.self_attn.layer_idx for layer in layers], x.shape[1]
        few = x.device.type == "cpu" and len(cache.lengths) <= FEW_LAYERS
        done, span = cache.appended(numbers[0]), FEW_LAYERS if few else 1
        tree = moved(branches, x.device)
        plan = Plan(layers, self.rotary, x, done, span, tree, ending, fixed)
        groups: dict[int, int] = {}
        for number in numbers:
            state = cache.state_of(number)
            if id(state) not in groups:
                groups[id(state)] = len(plan.states)
                plan.states.append(state)
                plan.windows.append(cache.window(number, count))
            plan.members.append(groups[id(state)])
            plan.buffers.append(cache.claim(number, count, self.allocate))
            plan.shared.append(cache.shared[number])
        return plan

    #: makes the buffers of caches, see `KVCache.claim`
    allocate: Callable[..., list[Tensor]] | None = None

    def run(self, plan: Plan) -> Tensor:
        return plan.run(plan.x, plan.counts(), plan.known(), plan.tree())


def runs_on(layer: DecoderLayer, x: Tensor) -> bool:
    """Whether a layer computes where x is, and nobody watches it: hooks that bring its weights
    there are no part of a graph, and any other makes one of every layer."""
    return layer.device == x.device and not is_watched(layer)


@dataclass
class Plan:
    """All that a compiled step reads and writes.

    x:       (B, q, D) tokens as they enter the first of `layers`
    done:    tokens of the answers before those
    span:    most layers with the same tokens that are one graph
    branches: of the tokens, where they are nodes of a tree
    ending:  what comes behind the last of `layers`
    fixed:   whether x always has this number of tokens: the graph need not allow for others
    states:  the rows as groups of layers see them, and how many places each looks at (`windows`)
    members: the group of every layer
    buffers: keys and values (B, G, capacity, d) of every layer
    shared:  what its rows begin with, as in `KVCache`
    """

    layers: list[DecoderLayer]
    rotary: Rotary
    x: Tensor
    done: int
    span: int = 1
    branches: Branches | None = None
    ending: Ending | None = None
    fixed: bool = False
    states: list[RowState] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    shared: list[tuple | None] = field(default_factory=list)

    def numbers(self) -> tuple[int, int]:
        """`done`, and the position of the first of these tokens in the answer, in a tree that of
        its root."""
        return self.done, self.done if self.branches is None else self.branches.root

    def counts(self) -> Tensor:
        return torch.tensor(self.numbers(), device=self.x.device)

    def tree(self) -> tuple[Tensor, Tensor] | None:
        """`depths` and `visible` of `branches`."""
        own = self.branches
        return None if own is None else (own.depths, own.visible)

    def known(self) -> list[dict[str, Tensor | None]]:
        """What `describe` is told of every group."""
        return [
            {
                "size": torch.tensor(state.size, device=self.x.device),
                "next_position": state.next_position,
                "valid": state.mask(window),
                "bias": state.key_bias(window),
                "directions": state.directions_of(self.rotary, window),
                "asking": None if state.directions is None else state.directions.asking,
            }
            for state, window in zip(self.states, self.windows, strict=True)
        ]

    def run(
        self,
        x: Tensor,
        counts: Tensor,
        known: list[dict[str, Tensor | None]],
        tree: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """What leaves the last layer (B, q, D), or the logits that `ending` makes of that; the
        tokens' keys and values are in the buffers.

        x, counts, known, tree: what the plan says, as tensors
        """
        if self.fixed:
            x = by_itself(x)
            torch._dynamo.mark_static(x, 1)
        torch._dynamo.mark_static(counts, 0)  # or a batch of two is as long as these by name
        biases = [state.directions and state.directions.function for state in self.states]
        groups = [
            (self.rotary, counts, window, x.shape[1], x.dtype, bias, tree, *group.values())
            for window, bias, group in zip(self.windows, biases, known, strict=True)
        ]
        spans = list(self.spans())
        if len(spans) == 1:
            whole = self.layers, x, self.buffers, self.shared, self.ending
            return compiled(run_all)(groups[0], *whole)
        described = [compiled(describe)(*group) for group in groups]
        for own in spans:
            ending = self.ending if own.stop == len(self.layers) else None
            work = self.layers[own], x, self.buffers[own], self.shared[own], ending
            x = compiled(run_layers)(described[self.members[own.start]], *work)
        return x

    def spans(self) -> Iterator[slice]:
        """Layers one behind the other that are one graph each."""
        start = 0
        for stop in range(1, len(self.layers) + 1):
            ends = stop == len(self.layers) or self.members[stop] != self.members[start]
            if ends or stop - start == self.span:
                yield slice(start, stop)
                start = stop


# --- what is compiled -----------------------------------------------------------------------


def describe(
    rotary: Rotary,
    counts: Tensor,
    window: int,
    count: int,
    dtype: torch.dtype,
    function: PositionBias | None,
    tree: tuple[Tensor, Tensor] | None,
    size: Tensor,
    next_position: Tensor,
    valid: Tensor | None,
    bias: Tensor | None,
    directions: Tensor | None,
    asking: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For a group's layers: places (q,) of the `count` new tokens in the buffers, the cosines and
    sines of `rope_of` their positions, and the mask (B or 1, 1, q, window) of numbers.

    counts, tree: as `Plan` says. size: () places of the prompt; the rest is as in `RowState` and
    `Directions`, for the `window` places that are looked at
    """
    done, first = counts.unbind()
    ahead, all_places = (torch.arange(n, device=counts.device) for n in (count, window))
    places = size + done + ahead
    if tree is None:
        seen = all_places <= places[:, None]
    else:
        depths, visible = tree
        ahead, reach = depths[-count:], visible.shape[1]
        behind = all_places - (size + done + count - reach)  # from the first node on
        inside, node = (behind >= 0) & (behind < reach), behind.clamp(0, reach - 1)
        seen = (visible[:, node] & inside) | (behind < 0)
        # Places of the cache that tokens one behind the other would have at the same positions.
        standing = torch.where(inside, size + first + depths[node], all_places)
    seen = seen[None, None]
    cos, sin = rotary(next_position[:, None] + first + ahead, dtype)
    if valid is not None:
        seen = seen & valid[:, None, None]
    if directions is not None and function is not None:
        queries = directions.index_select(1, size + first + ahead)
        keys = directions if tree is None else directions.index_select(1, standing)
        bias = joined(bias, between(function, queries, keys, asking))
    if bias is None:
        added = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, float("-inf"))
        return places, cos, sin, added
    return places, cos, sin, attention_mask(seen, bias, count, dtype)


class Slots:
    """The cache of one layer in a compiled step: new tokens go to given places of its buffers."""

    def __init__(self, keys: Tensor, values: Tensor, places: Tensor, window: int, shared):
        self.keys, self.values, self.places, self.window = keys, values, places, window
        self.beginning = shared

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.places, keys)
        self.values.index_copy_(2, self.places, values)
        return self.keys[:, :, : self.window], self.values[:, :, : self.window]

    def shared_by(self, layer: int) -> tuple | None:
        return self.beginning


def run_layers(
    described: tuple[Tensor, Tensor, Tensor, Tensor],
    layers: list[DecoderLayer],
    x: Tensor,
    buffers: list[tuple[Tensor, Tensor]],
    shared: list[tuple | None],
    ending: Ending | None,
) -> Tensor:
    """Layers on x (B, q, D), and what comes behind the last of them. described: what `describe`
    gives; there the keys and values go to `places` of the buffers."""
    places, cos, sin, mask = described
    for layer, (keys, values), beginning in zip(layers, buffers, shared, strict=True):
        slots = Slots(keys, values, places, mask.shape[-1], beginning)
        x, _ = layer(x, Step((cos, sin), mask), slots)
    return x if ending is None else ending.here(x)


def run_all(group: tuple, *work) -> Tensor:
    """`run_layers` where all layers hold the same tokens, and `describe` before it, as one graph.
    group: the arguments of `describe`; work: those of `run_layers` behind what that gives"""
    return run_layers(describe(*group), *work)
