"""How much of a step of self-speculation goes by inside the decoder and the drafter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from llava.devices import device_of


class TimedStep:
    """In place of a model's `DecodeStep`: does the same and adds up how long its passes take. It
    waits for the device around each of them, so that answers are slower meanwhile.

    now:     says what time it is, in seconds
    seconds: of all passes so far
    """

    def __init__(self, step, device: torch.device, now: Callable[[], float]):
        self.step, self.device, self.now, self.seconds = step, device, now, 0.0

    def __call__(self, *args, **keywords):
        with self._timed():
            return self.step(*args, **keywords)

    def both(self, *args):
        with self._timed():
            return self.step.both(*args)

    def several(self, *args):
        with self._timed():
            return self.step.several(*args)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = self._moment()
        yield
        self.seconds += self._moment() - start

    def _moment(self) -> float:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize(self.device)
        return self.now()


@contextmanager
def timed_passes(model, now: Callable[[], float]) -> Iterator[TimedStep]:
    """Times the passes of a model's steps inside the block."""
    decoder, kept = model.model, model.model.step
    decoder.step = timed = TimedStep(kept, device_of(decoder.layers[0]), now)
    try:
        yield timed
    finally:
        decoder.step = kept
