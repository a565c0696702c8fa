"""Steps of decoding as CUDA graphs: a step is launched at once, whatever it is made of.

A graph reads and writes fixed addresses. So a step is captured once for each number of rows, tokens
and places that it sees, its inputs are copied to where it was captured, and the buffers of a cache
that is not needed any more serve the next one.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...pruning.captured import capture
from ...pruning.required import required
from ..kv_cache import KVCache, RowState
from ..position_bias import Directions
from .compiled_step import CompiledStep, Plan
from .layers import DecoderLayer

#: graphs that are kept
MOST_GRAPHS = 64


class GraphStep(CompiledStep):
    """A compiled step whose kernels are launched as one graph."""

    def __init__(self, *args, capture: Callable | None = None):
        """capture: makes of a function of no arguments, and the device that it works on, a function
        that does the same work on the same tensors again; None: as a CUDA graph"""
        super().__init__(*args)
        self.capture = CudaCapture() if capture is None else capture
        self.graphs: OrderedDict[tuple, Captured] = OrderedDict()
        self.spare: dict[int, list[Tensor]] = {}  # per layer keys and values of a former cache

    def run(self, plan: Plan) -> list[Tensor]:
        if any(own is not None for own in plan.shared):
            # A graph would be of one image alone, and hold its keys and values until it is evicted.
            return super().run(plan)
        key = key_of(plan)
        if key not in self.graphs:
            if any(part._modules for layer in plan.layers for part in products_of(layer)):
                return super().run(plan)  # adapters, which may be switched off
            self.graphs[key] = Captured(plan, self.capture)
            if len(self.graphs) > MOST_GRAPHS:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        return self.graphs[key](plan)

    def allocate(self, cache: KVCache, layer: int, capacity: int) -> list[Tensor]:
        """Buffers of a former cache, if they are large enough for `cache`, else new ones; they come
        back when the cache is gone."""
        like = cache.entries(layer)[0]
        buffers = self.spare.pop(layer, None)
        if buffers is not None and serves(buffers[0], like, capacity):
            for buffer in buffers:
                buffer.zero_()  # masked places are multiplied by 0, which does not help with NaN
        else:
            self._forget(buffers)
            shape = (*like.shape[:2], capacity, like.shape[3])
            with torch.inference_mode(False):  # written to outside of that mode as well
                buffers = [like.new_zeros(shape) for _ in range(2)]
        weakref.finalize(cache, self._take_back, layer, buffers).atexit = False
        return buffers

    def _take_back(self, layer: int, buffers: list[Tensor]) -> None:
        """The larger ones stay. It may run while another thread wants buffers: those that are
        compared here are nobody's meanwhile."""
        while (known := self.spare.pop(layer, None)) is not None:
            gone, buffers = sorted((known, buffers), key=lambda pair: pair[0].numel())
            self._forget(gone)
        self.spare[layer] = buffers

    def _forget(self, buffers: list[Tensor] | None) -> None:
        """Gives graphs up that hold these buffers, so that their memory is free."""
        if buffers is not None:
            gone = buffers[0].data_ptr()
            for key, own in list(self.graphs.items()):
                if gone in own.addresses:
                    self.graphs.pop(key, None)


def serves(buffer: Tensor, like: Tensor, capacity: int) -> bool:
    """Whether a buffer (B, G, n, d) has room for `capacity` entries such as `like` (B, G, S, d)."""
    batch, heads, places, width = buffer.shape
    same = (batch, heads, width, buffer.dtype, buffer.device)
    other = (*like.shape[:2], like.shape[3], like.dtype, like.device)
    return same == other and places >= capacity


def products_of(layer: DecoderLayer) -> list[nn.Module]:
    """The modules of a layer that hold its large weights, or what took their places."""
    # Faster than `children`: this is asked in every step.
    parts = *layer.self_attn._modules.values(), *layer.mlp._modules.values()
    return [part for part in parts if part is not None]


def key_of(plan: Plan) -> tuple:
    """What a graph of the step depends on, apart from the contents of tensors. Rows share no
    beginning."""
    weights = [
        (layer.self_attn.q_proj.weight.data_ptr(), *map(id, products_of(layer)))
        for layer in plan.layers
    ]
    groups = [
        (window, state.valid is None, state.bias is None, about(state.directions))
        for state, window in zip(plan.states, plan.windows, strict=True)
    ]
    buffers = [(keys.data_ptr(), keys.shape) for keys, _ in plan.buffers]
    tree = [x.shape for x in plan.tree() or ()]
    ending = [] if plan.ending is None else [*plan.ending.addresses(), plan.ending.last]
    parts: tuple[list, ...] = (weights, groups, plan.members, plan.stops, buffers)
    parts += tree, ending
    return (plan.x.shape, plan.x.dtype, plan.x.device, *map(tuple, parts))


def about(directions: Directions | None) -> tuple | None:
    """What a graph depends on of a bias by position."""
    return None if directions is None else (directions.function, directions.asking is None)


class Captured:
    """A step that can be run again on other tokens."""

    def __init__(self, plan: Plan, capture: Callable):
        with torch.inference_mode(False), torch.no_grad():
            self.x = torch.empty_like(plan.x)
            self.counts = torch.zeros(2, dtype=torch.long, device=plan.x.device)
            tree = plan.tree()
            self.tree: tuple[Tensor, Tensor] | None = None
            if tree is not None:
                self.tree = torch.empty_like(tree[0]), torch.empty_like(tree[1])
            self.known = [
                {name: None if own is None else own.clone() for name, own in group.items()}
                for group in plan.known()
            ]
        self.addresses = {keys.data_ptr() for keys, _ in plan.buffers}
        # What has to stay where it is.
        products = [part for layer in plan.layers for part in products_of(layer)]
        self.held = plan.layers, products, plan.buffers, plan.ending
        self.states: list[RowState] = []
        self.load(plan)
        self.replay = capture(
            lambda: plan.run(self.x, self.counts, self.known, self.tree), self.x.device
        )

    def load(self, plan: Plan) -> None:
        """Puts what the step is about to where it is read."""
        self.x.copy_(plan.x)
        for there, number in zip(self.counts, plan.numbers(), strict=True):
            there.fill_(number)  # without a copy from the host
        for there, here in zip(self.tree or (), plan.tree() or (), strict=True):
            there.copy_(here)
        if [id(state) for state in self.states] == [id(state) for state in plan.states]:
            return
        for known, news in zip(self.known, plan.known(), strict=True):
            for name, tensor in known.items():
                if tensor is not None:
                    tensor.copy_(required(news[name], f"a step of this graph needs {name}"))
        self.states = plan.states

    def __call__(self, plan: Plan) -> list[Tensor]:
        self.load(plan)
        return [own.clone() for own in self.replay()]  # the next step writes over them


class CudaCapture:
    """Captures work as CUDA graphs that share their memory: only one of them runs at a time."""

    def __init__(self):
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(
        self, work: Callable[[], list[Tensor]], device: torch.device
    ) -> Callable[[], list[Tensor]]:
        graph, out = capture(work, device, self.pool)

        def replay() -> list[Tensor]:
            graph.replay()
            return out

        return replay
