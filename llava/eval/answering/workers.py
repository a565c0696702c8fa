"""The processes of one run, on any number of machines: who does what, and when all are done.

Started by `accelerate launch` (or torchrun), they agree through the key-value store of
torch.distributed, which is the same on CPUs and GPUs: answers travel through files, so that no
collective operation is needed and a slow process holds nobody up. A process that died may be
started again beside the others, as long as the store is there: it first takes what it had claimed.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

POLL_SECONDS = 0.2
#: how long the others are waited for when there is nothing left to do
PATIENCE_SECONDS = 1800.0
#: how long the main process stays for the others to see that all are done
LEAVING_SECONDS = 30.0
STORE_TIMEOUT = timedelta(hours=24)


def own_gpu() -> str | None:
    """The GPU of this process among those that a launcher started on this machine (LOCAL_RANK);
    None: where there is one process or no GPU, the model's default is right."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


class Workers:
    """This process among those of its run.

    rank, size: its number and how many there are; `main`: whether it is the first
    """

    def __init__(self, rank: int = 0, size: int = 1, store=None):
        self.rank, self.size, self.store = rank, size, store
        self._keys = self._counted = 0

    @classmethod
    def from_environment(cls) -> "Workers":
        """What the launcher's variables (RANK, WORLD_SIZE, MASTER_ADDR, ...) say; alone without."""
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls()
        store, rank, size = next(torch.distributed.rendezvous("env://", timeout=STORE_TIMEOUT))
        return cls(rank, size, store)

    @property
    def main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def in_touch(self):
        """Names what it means when the store cannot be reached any more, in a ConnectionError."""
        try:
            yield
        except torch.distributed.DistError as error:
            raise ConnectionError(
                "the first process, which hands out the questions, is gone: start all of them "
                "again to answer what is left"
            ) from error

    def next_key(self) -> str:
        """A name for the next thing done together; all processes must ask equally often."""
        self._keys += 1
        self._counted = 0
        return f"task{self._keys}"

    def tell(self, key: str, value=None):
        """Returns on all processes what the main one gives (a JSON value)."""
        if self.store is None:
            return value
        if self.main:
            self.store.set(key, json.dumps(value))
            return value
        return json.loads(self.store.get(key))

    def claim(self, key: str, count: int) -> Iterator[int]:
        """Yields numbers below `count`: every one to one process, in order, as they ask. A process
        that stands in for one that died gets the numbers of that one first, and nothing when that
        one was done.

        A claim is one step of the store, so that no number is lost with a process, whenever it
        dies. What is claimed is always all numbers below some number. Ends early where a process
        gave the task up.
        """
        if self.store is None:
            yield from range(count)
            return
        if self.store.check([self._own(key, "done")]):
            return
        stands_in = self.replaces(key)
        self.store.set(self._own(key, "begun"), "")
        number = 0
        while not self.store.check([f"{key}/given_up"]):
            if not stands_in:  # what is counted is claimed; there may be more
                number = max(number, self.store.add(f"{key}/claimed", 0))
            if number >= count:
                return
            if self._taken_by(key, number) == self.rank:
                if not stands_in:
                    self.store.add(f"{key}/claimed", 1)
                yield number
            number += 1

    def _taken_by(self, key: str, number: int) -> int:
        """The process that has claimed a number: this one, where it was free."""
        return int(self.store.compare_set(f"{key}/claim/{number}", "", str(self.rank)))

    def replaces(self, key: str) -> bool:
        """Whether this process stands in for one that had begun to claim, and died before it was
        done."""
        if self.store is None or not self.store.check([self._own(key, "begun")]):
            return False
        return not self.store.check([self._own(key, "done")])

    def done(self, key: str) -> None:
        """Says that what this process had claimed is written: nobody has to stand in for it."""
        if self.store is not None:
            self.store.set(self._own(key, "done"), "")

    def give_up(self, key: str, reason) -> None:
        """Ends a task on all processes: nothing more is claimed. reason: a JSON value"""
        self.store.set(f"{key}/given_up", json.dumps(reason))

    def given_up(self, key: str):
        """Why some process gave the task up, to be asked when all have arrived; else None."""
        if self.store is None or not self.store.check([f"{key}/given_up"]):
            return None
        return json.loads(self.store.get(f"{key}/given_up"))

    def _own(self, key: str, state: str) -> str:
        return f"{key}/{state}/{self.rank}"

    def count(self, key: str, number: int) -> int:
        """Adds to a counter that all processes share; returns its value."""
        if self.store is not None:
            return self.store.add(f"{key}/count", number)
        self._counted += number
        return self._counted

    def wait(self, key: str) -> None:
        """Waits until all processes are here. Raises TimeoutError when some never come."""
        if self.store is None:
            return
        here, start = self._arrive(f"{key}/here"), time.monotonic()
        while not self.store.check(here):
            if time.monotonic() - start > PATIENCE_SECONDS:
                absent = sum(not self.store.check([place]) for place in here)
                raise TimeoutError(
                    f"{absent} of {self.size} processes did not finish: start the same "
                    "command again to answer what they left"
                )
            time.sleep(POLL_SECONDS)
        # The main process may hold the store itself: it leaves when the others need it no more.
        gone, start = self._arrive(f"{key}/gone"), time.monotonic()
        while (
            self.main and not self.store.check(gone) and time.monotonic() - start < LEAVING_SECONDS
        ):
            time.sleep(POLL_SECONDS / 4)

    def _arrive(self, place: str) -> list[str]:
        """Says that this process is at a place; returns the keys that are there when all are."""
        keys = [f"{place}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], "")
        return keys

    def device(self) -> str | None:
        """The GPU of this process; None: where there is one process or no GPU, the model's default
        is right."""
        return None if self.store is None else own_gpu()
