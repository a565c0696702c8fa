"""Many small operations as one launch on a GPU.

A method that picks tokens one after the other is hundreds of kernels that take less time than the
host needs to ask for them. On CUDA such a loop is captured as a graph when arguments of the same
shapes come again, and replayed from then on; elsewhere, and until then, it simply runs. So it does
where gradients are recorded.

A captured function

- takes tensors and hashable values, and gives a tensor, or a tuple of tensors;
- depends on nothing else, and writes to none of its arguments;
- never waits for the device: what it launches follows from shapes and values of the host alone.

`LLAVA_CAPTURE=0` in the environment, or `SETTINGS.enabled = False`, switches it off.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple, Unpack

    Arguments = TypeVarTuple("Arguments")


@dataclass
class Settings:
    """
    enabled:    False: functions run as they are
    after:      calls with the same shapes before one is captured, which costs as much as some ten
                of them: images that come in any size are not worth it
    most:       captured functions that are kept for a device; the longest unused goes first
    most_bytes: of arguments; with larger ones it is the kernels that take time, and graphs would
                hold that memory
    """

    enabled: bool = os.environ.get("LLAVA_CAPTURE", "1") != "0"
    after: int = 2
    most: int = 16
    most_bytes: int = 2**27


SETTINGS = Settings()


@contextmanager
def nothing_captured() -> Iterator[None]:
    """A block in which functions run as they are, so that their operations can be counted."""
    before, SETTINGS.enabled = SETTINGS.enabled, False
    try:
        yield
    finally:
        SETTINGS.enabled = before


Found = TypeVar("Found")
Result = TypeVar("Result", bound=Tensor | tuple[Tensor, ...])


def captured(
    function: Callable[[Unpack[Arguments]], Result],
) -> Callable[[Unpack[Arguments]], Result]:
    """`function`, see above, as one launch where that is possible; called with positions alone."""

    @wraps(function)
    def call(*args: Unpack[Arguments]) -> Result:
        tensors = [x for x in args if isinstance(x, Tensor)]
        if not (SETTINGS.enabled and can_capture(tensors)):
            return function(*args)
        return CAPTURES.run(function, args)

    return call


def can_capture(tensors: list[Tensor]) -> bool:
    """Whether there is a graph to capture: all is on one GPU and small, nobody else captures, and
    no gradients are asked for."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    devices = {x.device for x in tensors}
    if len(devices) != 1 or devices.pop().type != "cuda":
        return False
    size = sum(x.numel() * x.element_size() for x in tensors)
    return size <= SETTINGS.most_bytes and not torch.cuda.is_current_stream_capturing()


def place_of(device: torch.device) -> Hashable:
    """What graphs that share memory have in common: they run one behind the other."""
    return device, torch.cuda.current_stream(device).cuda_stream


#: held by the thread that captures: they all do so in the same stream of a device
CAPTURING = threading.Lock()


@cache
def stream_aside(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device that work is captured in: libraries keep memory for every stream that
    they have seen, and torch's own one for this is of whatever device captures first."""
    return torch.cuda.Stream(device)


def capture(work: Callable[[], Found], device: torch.device, pool: Any) -> tuple[Any, Found]:
    """(a CUDA graph of what `work()` does on `device`, the tensors that it writes its result to).

    The device need not be the current one, and other threads may go on using it. pool: memory that
    the graph shares with others, which run before or after it
    """
    with CAPTURING, torch.cuda.device(device):
        current, aside = torch.cuda.current_stream(), stream_aside(device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):  # compiles; libraries allocate what they need the first time
            work()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        begun = torch.cuda.graph(graph, pool, aside, capture_error_mode="thread_local")
        with ExitStack() as capturing:
            with torch.inference_mode(False):  # torch makes tensors here that all graphs write to
                capturing.enter_context(begun)
            output = work()
    return graph, output


class Graph:
    """A function captured with arguments of some shapes.

    pool: memory that it shares with graphs of the same stream, for what only lives inside of them
    """

    def __init__(self, function: Callable, args: tuple, pool: Any):
        self.args = tuple(torch.empty_like(x) if isinstance(x, Tensor) else x for x in args)
        self.load(args)
        device = next(x.device for x in self.args if isinstance(x, Tensor))
        self.graph, self.output = capture(lambda: function(*self.args), device, pool)

    def load(self, args: tuple) -> None:
        for own, given in zip(self.args, args, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)

    def __call__(self, args: tuple) -> Tensor | tuple[Tensor, ...]:
        self.load(args)
        self.graph.replay()
        if isinstance(self.output, Tensor):  # the next replay writes to the same memory
            return self.output.clone()
        return tuple(x.clone() for x in self.output)


class Captures:
    """The functions captured so far, and how often shapes came that are not captured yet."""

    def __init__(self):
        self.lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        self.graphs: dict[Hashable, OrderedDict[Hashable, Graph]] = {}
        self.pools: dict[Hashable, Any] = {}
        self.calls: OrderedDict[Hashable, int] = OrderedDict()

    def run(self, function: Callable, args: tuple) -> Any:
        # Buffers of a graph belong to one call at a time.
        with self.lock, torch.inference_mode(False), torch.no_grad():
            place = place_of(next(x.device for x in args if isinstance(x, Tensor)))
            graphs, key = self.graphs.setdefault(place, OrderedDict()), key_of(function, args)
            if key not in graphs and self.comes_again((place, key)):
                if place not in self.pools:
                    self.pools[place] = self.new_pool()
                graphs[key] = self.capture(function, args, self.pools[place])
                if len(graphs) > SETTINGS.most:
                    graphs.popitem(last=False)
            if key in graphs:
                graphs.move_to_end(key)
                return graphs[key](args)
        return function(*args)

    def comes_again(self, key: Hashable) -> bool:
        """Counts a call; whether there were enough of them."""
        self.calls[key] = self.calls.pop(key, 0) + 1
        if len(self.calls) > 8 * SETTINGS.most:
            self.calls.popitem(last=False)
        return self.calls[key] > SETTINGS.after

    capture = Graph

    def new_pool(self):
        return torch.cuda.graph_pool_handle()


def key_of(function: Callable, args: tuple) -> Hashable:
    parts = ((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in args)
    return function, *parts


CAPTURES = Captures()
