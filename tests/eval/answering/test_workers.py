"""Processes agree through a store: nothing is lost with one that dies, whenever it dies."""

import contextlib
import threading

import pytest
from torch.distributed import HashStore

from llava.eval.answering.workers import Workers


class Dying:
    """A store whose process dies at its call number `last`: before it is carried out, or after."""

    def __init__(self, store, last, before):
        self.store, self.last, self.before, self.calls = store, last, before, 0

    def __getattr__(self, name):
        def call(*args):
            self.calls += 1
            if self.calls == self.last and self.before:
                raise KeyboardInterrupt
            value = getattr(self.store, name)(*args)
            if self.calls == self.last:
                raise KeyboardInterrupt
            return value

        return call


def take(store, rank, most=99):
    """A process of two that takes up to `most` of 6 numbers, and is done with them, or dies.
    Returns what it took."""
    workers, taken = Workers(rank, 2, store), []
    try:
        for number in workers.claim("task", 6):
            taken.append(number)
            if len(taken) == most:
                return taken
        workers.done("task")
    except KeyboardInterrupt:
        pass
    return taken


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("last", range(1, 21))
def test_wherever_a_process_dies_no_number_is_lost_and_none_is_for_two(last, before):
    store = HashStore()
    first = take(store, 0, most=1)
    dying = Dying(store, last, before)
    died = take(dying, 1)
    again = take(Dying(store, 3, before), 1)  # which dies as well
    beside = take(store, 0)
    rest = take(store, 1)
    assert dying.calls == last
    assert sorted({*first, *beside, *died, *again, *rest}) == list(range(6))
    assert not {*first, *beside} & {*died, *again, *rest}
    assert take(store, 1) == []  # done is done


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_wherever_a_process_dies_while_it_waits_the_others_see_it_when_it_is_back(last, before):
    store, ends = HashStore(), []

    def main():
        Workers(0, 2, store).wait("end")
        ends.append("main")

    beside = threading.Thread(target=main, daemon=True)
    beside.start()
    with contextlib.suppress(KeyboardInterrupt):
        Workers(1, 2, Dying(store, last, before)).wait("end")
    Workers(1, 2, store).wait("end")
    beside.join(600)
    assert ends == ["main"]


def test_waiting_for_a_lost_process_ends_with_what_to_do(monkeypatch):
    monkeypatch.setattr("llava.eval.answering.workers.PATIENCE_SECONDS", 0.01)
    monkeypatch.setattr("llava.eval.answering.workers.POLL_SECONDS", 0.01)
    with pytest.raises(TimeoutError, match="2 of 3 processes did not finish: start the same"):
        Workers(0, 3, HashStore()).wait("end")
