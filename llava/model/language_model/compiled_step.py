"""A step of decoding as graphs, whose shapes are the same from token to token.

`CompiledStep` looks at a whole bucket of places of each cache and masks those that are free, so
that nothing in it but the contents of tensors changes. The norm and the head behind the last layer
may belong to a graph; those of trees run after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...devices import moved
from ...linear import is_faster_fixed, materialized
from ...pruning.branches import Branches
from ...pruning.position_bias import PositionBias
from ..kv_cache import KVCache, RowState
from ..position_bias import between, joined
from .attention import attention_mask
from .compiling import by_itself, compiled
from .decode_step import DecodeStep, Ending
from .layers import DecoderLayer, Rotary, Step, is_watched_inside

#: decoders up to so many layers are compiled as a whole on a CPU, as calling six small graphs costs
#: more there than what they save; deeper ones layer by layer, as all layers share one graph (but
#: for the last, which has the norm and the head in its graph)
FEW_LAYERS = 12


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
        if watched or not self.runs(layers, x):
            return super().__call__(layers, x, cache, collect, trace, branches, ending)
        more = max(0, most - x.shape[1]) if branches is None else 0
        fixed = most > 0 if branches is None else is_faster_fixed(x)
        if more:  # behind the tokens, so that these do not see it
            x = torch.cat([x, x[:, -1:].expand(-1, more, -1)], dim=1)
        within = None
        if ending is not None and ending.fits(x) and not (more and ending.last):
            within = ending
        (out,) = self.run(self.plan(layers, x, cache, branches, within, fixed))
        if more:
            for layer in layers:
                number = layer.self_attn.layer_idx
                cache.crop(number, cache.lengths[number] - more)
            out = out[:, :-more]
        return out if ending is None or ending is within else ending(out)

    def both(
        self,
        layers: Iterable[DecoderLayer],
        further: Iterable[DecoderLayer],
        x: Tensor,
        cache: KVCache,
        ending: Ending,
    ) -> tuple[Tensor, Tensor]:
        """As one graph, where they share what they know of the tokens."""
        parts = list(layers), list(further)
        whole = [*parts[0], *parts[1]]
        known = {id(cache.state_of(layer.self_attn.layer_idx)) for layer in whole}
        if len(known) > 1 or not all(parts) or not self.runs(whole, x) or not ending.fits(x):
            return super().both(*parts, x, cache, ending)
        plan = self.plan(whole, x, cache, ending=ending)
        plan.stops = [len(parts[0]), len(whole)]
        between, out = self.run(plan)
        return between, out

    @staticmethod
    def runs(layers: list[DecoderLayer], x: Tensor) -> bool:
        """Whether it can run these on x."""
        able = bool(layers) and all(runs_on(layer, x) for layer in layers)
        return able and not torch.is_grad_enabled()

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

    def run(self, plan: Plan) -> list[Tensor]:
        return plan.run(plan.x, plan.counts(), plan.known(), plan.tree())


def runs_on(layer: DecoderLayer, x: Tensor) -> bool:
    """Whether a layer computes where x is, and nobody watches it or a part of it: hooks that bring
    its weights there are no part of a graph, and any other makes one of every layer."""
    return layer.device == x.device and not is_watched_inside(layer)


#: layers one behind the other, the buffers of each, and what its rows begin with
Part = tuple[list[DecoderLayer], list[tuple[Tensor, Tensor]], list[tuple | None]]


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
    stops:   after how many layers what these give is wanted; the last of them is all of them
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
    stops: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.stops = self.stops or [len(self.layers)]

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
        """What `describe` is told of every group, by the names in `KNOWN`."""
        return [
            {
                "size": state.size_as_tensor(),
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
    ) -> list[Tensor]:
        """What is wanted: what leaves layers (B, q, D), of the last one the logits that `ending`
        makes of that; the tokens' keys and values are in the buffers.

        x, counts, known, tree: what the plan says, as tensors
        """
        if self.fixed:
            x = by_itself(x)
            torch._dynamo.mark_static(x, 1)
        torch._dynamo.mark_static(counts, 0)  # or a batch of two is as long as these by name
        biases = [state.directions and state.directions.function for state in self.states]
        groups = [
            (self.rotary, counts, window, x.shape[1], x.dtype, bias, tree, *map(own.get, KNOWN))
            for window, bias, own in zip(self.windows, biases, known, strict=True)
        ]
        if len(groups) == 1 and len(self.layers) <= self.span:
            parts = map(slice, [0, *self.stops], self.stops)
            return compiled(run_all)(groups[0], list(map(self.part, parts)), x, self.ending)
        described, found = [compiled(describe)(*group) for group in groups], []
        for own in self.spans():
            ending = self.ending if own.stop == len(self.layers) else None
            given = described[self.members[own.start]]
            (x,) = compiled(run_layers)(given, [self.part(own)], x, ending)
            if own.stop in self.stops:
                found.append(x)
        return found

    def part(self, own: slice) -> Part:
        return self.layers[own], self.buffers[own], self.shared[own]

    def spans(self) -> Iterator[slice]:
        """Layers one behind the other that are one graph each."""
        start = 0
        for stop in range(1, len(self.layers) + 1):
            ends = stop in self.stops or self.members[stop] != self.members[start]
            if ends or stop - start == self.span:
                yield slice(start, stop)
                start = stop


# --- what is compiled -----------------------------------------------------------------------

#: the last arguments of `describe`, in their order: what is known of a group of layers
KNOWN = ("size", "next_position", "valid", "bias", "directions", "asking")


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
    cos, sin = materialized(cos), materialized(sin)
    if bias is None:
        added = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, float("-inf"))
        return places, cos, sin, materialized(added)
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
    parts: list[Part],
    x: Tensor,
    ending: Ending | None,
) -> list[Tensor]:
    """What every part gives, on x (B, q, D) or on what the one before it gives; `ending` comes
    behind the last of them. described: what `describe` gives; there the keys and values go to
    `places` of the buffers."""
    (places, cos, sin, mask), found = described, []
    for part in parts:
        for layer, (keys, values), beginning in zip(*part, strict=True):
            slots = Slots(keys, values, places, mask.shape[-1], beginning)
            x, _ = layer(x, Step((cos, sin), mask), slots)
        found.append(x)
    if ending is not None:
        found[-1] = ending.here(x)
    return found


def run_all(group: tuple, *work) -> list[Tensor]:
    """`run_layers` where all layers hold the same tokens, and `describe` before it, as one graph.
    group: the arguments of `describe`; work: those of `run_layers` behind what that gives"""
    return run_layers(describe(*group), *work)
