"""One model shared by several generations, a step at a time.

A model has one pruning method and one trace. Whoever generates holds the turn while the model runs,
with its own method and trace in place, and passes the turn on after every piece of text: requests
with different methods advance side by side, and none ever runs with the method of another.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from ..pruning import Pruner, PruningTrace


class FairLock:
    """A lock that is handed to those who wait in the order they came."""

    def __init__(self):
        self._state = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._held = False

    def acquire(self) -> None:
        with self._state:
            if not self._held:
                self._held = True
                return
            gate = threading.Lock()
            gate.acquire()
            self._waiting.append(gate)
        gate.acquire()  # opened by `release`, which leaves the lock held for us

    def release(self) -> None:
        with self._state:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False


class Turns:
    """The turns at one model."""

    def __init__(self, model):
        self.model = model
        self._lock = FairLock()

    def seat(self, pruner: Pruner) -> Seat:
        """A place for one request; `with seat:` waits for a turn and holds it."""
        return Seat(self, pruner)


class Seat:
    """trace: what the method kept, filled while the seat has the turn."""

    def __init__(self, turns: Turns, pruner: Pruner):
        self.turns, self.pruner, self.trace = turns, pruner, PruningTrace()
        self._holding = False

    def __enter__(self) -> Seat:
        self.turns._lock.acquire()
        model = self.turns.model
        try:
            if model.pruner is not self.pruner:
                model.pruner = self.pruner
                self.pruner = model.pruner  # a share of tokens may be a number by now
            model.pruning_trace = self.trace
        except BaseException:
            self.turns._lock.release()
            raise
        self._holding = True
        return self

    def __exit__(self, *_) -> None:
        if self._holding:
            self._holding = False
            self.turns.model.pruning_trace = None
            self.turns._lock.release()

    def pass_on(self, meanwhile: Callable[[], None]) -> None:
        """Lets the others run, does `meanwhile` without the turn, and waits for the next turn;
        without a turn, does it."""
        had_turn = self._holding
        self.__exit__()
        try:
            meanwhile()
        finally:
            if had_turn:
                self.__enter__()
