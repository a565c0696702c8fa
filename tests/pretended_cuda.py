"""Streams and graphs of GPUs that are not there: what is captured, by which device is current.

    cuda = PretendedCuda(monkeypatch)
    cuda.launch(torch.device("cuda", 1), lambda: log.append(1))     # a kernel on tensors of cuda:1

As torch does, a kernel goes to the current stream of the device that its tensors are on, and is
captured where that stream is; it runs at once otherwise, also while another stream is captured. The
stream that torch captures in by itself is of the device that was current when it was first asked.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch


class PretendedStream:
    def __init__(self, device: int):
        self.device, self.cuda_stream = torch.device("cuda", device), id(self)
        self.graph: PretendedGraph | None = None

    def wait_stream(self, other: PretendedStream) -> None:
        """Everything here runs at once."""


class PretendedGraph:
    def __init__(self):
        self.kernels: list[Callable] = []

    def replay(self) -> None:
        for kernel in self.kernels:
            kernel()


class PretendedEvent:
    def __init__(self, cuda: PretendedCuda):
        self.cuda, self.stream = cuda, None

    def record(self, stream: PretendedStream | None = None) -> None:
        self.stream = stream or self.cuda.current_stream()

    def elapsed_time(self, other: PretendedEvent) -> float:
        return 1.0


class PretendedCuda:
    """In the place of these parts of `torch.cuda`.

    current:  the current device
    modes:    how graphs were captured, as torch names what other threads may do meanwhile
    waited:   devices that the host waited for
    """

    def __init__(self, monkeypatch):
        self.current, self.modes, self.waited = 0, [], []
        self.streams: dict[int, PretendedStream] = {}
        self.default: PretendedStream | None = None
        self.random: torch.Tensor | None = None  # what graphs read the state of the generator from
        parts = dict(
            Stream=self.make_stream,
            Event=lambda enable_timing=False: PretendedEvent(self),
            CUDAGraph=PretendedGraph,
            graph_pool_handle=lambda: (0, 1),
            synchronize=lambda device=None: self.waited.append(self.index(device)),
        )
        names = ("device", "stream", "current_stream", "graph")
        for name, part in [*parts.items(), *((name, getattr(self, name)) for name in names)]:
            monkeypatch.setattr(torch.cuda, name, part)

    def index(self, device: torch.device | None) -> int:
        return self.current if device is None or device.index is None else device.index

    def make_stream(self, device: torch.device | None = None) -> PretendedStream:
        return PretendedStream(self.index(device))

    def current_stream(self, device: torch.device | None = None) -> PretendedStream:
        index = self.index(device)
        return self.streams.setdefault(index, PretendedStream(index))

    @contextmanager
    def device(self, device: torch.device):
        before, self.current = self.current, self.index(device)
        yield
        self.current = before

    @contextmanager
    def stream(self, stream: PretendedStream):
        with self.device(stream.device):
            before = self.current_stream()
            self.streams[self.current] = stream
            yield
            self.streams[self.current] = before

    @contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        if stream is None:
            stream = self.default = self.default or self.make_stream()
        if self.random is None:
            self.random = torch.empty(1)
        self.random.fill_(0)
        self.modes.append(capture_error_mode)
        with self.stream(stream):
            stream.graph = graph
            yield
            stream.graph = None

    def launch(self, device: torch.device, kernel: Callable[[], object]) -> None:
        """Asks a device for something, as an operation on its tensors does."""
        graph = self.current_stream(device).graph
        if graph is None:
            kernel()
        else:
            graph.kernels.append(kernel)
