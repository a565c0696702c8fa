"""Time per stage of a running model, measured from outside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps

import torch

from llava.eval.efficiency.wrapping import wrapped


@dataclass
class Span:
    """One passage through a stage; moments are seconds on a CPU and events on a GPU."""

    stage: str
    parent: Span | None
    start: object
    stop: object = None


class Stopwatch:
    """Records when a model enters and leaves its stages.

    On a GPU the moments are events in its stream, so nothing waits for it before `read`; on MPS
    every moment waits for the device.
    now: says what time it is on a CPU, in seconds
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter):
        self.now, self.device = now, device
        self.cuda, self.mps = device.type == "cuda", device.type == "mps"
        self.spans: list[Span] = []
        self._open: Span | None = None

    @contextmanager
    def span(self, stage: str) -> Iterator[Span]:
        """Times the block as one passage through `stage`."""
        span = Span(stage, self._open, self._now())
        self.spans.append(span)
        self._open = span
        try:
            yield span
        finally:
            span.stop = self._now()
            self._open = span.parent

    @contextmanager
    def watch(self, methods: list[tuple[object, str, str | Callable[[], str]]]) -> Iterator[None]:
        """Times the calls of methods inside the block: (object, method name, stage), where stage
        may be a function that names the stage of the call at hand."""
        with wrapped(
            [(owner, name, partial(self._timed, stage=stage)) for owner, name, stage in methods]
        ):
            yield

    def _timed(self, method: Callable, stage: str | Callable[[], str]) -> Callable:
        @wraps(method)  # transformers reads the signature of `forward`
        def call(*args, **kwargs):
            with self.span(stage if isinstance(stage, str) else stage()):
                return method(*args, **kwargs)

        return call

    def seen(self, stage: str) -> bool:
        """Whether there was a passage through `stage`, an open one included."""
        return any(span.stage == stage for span in self.spans)  # found early, among the first

    def read(self) -> dict[str, list[float]]:
        """Seconds of every passage, by stage; time inside a nested stage counts there only."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        seconds = {id(span): self.elapsed(span.start, span.stop) for span in self.spans}
        own = dict(seconds)
        for span in self.spans:
            if span.parent is not None:
                own[id(span.parent)] -= seconds[id(span)]
        stages: dict[str, list[float]] = {}
        for span in self.spans:
            stages.setdefault(span.stage, []).append(own[id(span)])
        return stages

    def elapsed(self, start, stop) -> float:
        """Seconds between two moments."""
        return start.elapsed_time(stop) / 1000 if self.cuda else stop - start

    def _now(self):
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))  # not of the current device
            return event
        if self.mps:
            torch.mps.synchronize()
        return self.now()
