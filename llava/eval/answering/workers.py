"""The processes of one run, on any number of machines: who does what, and when all are done.

Started by `accelerate launch` (or torchrun), they agree through the key-value store of
torch.distributed, which is the same on CPUs and GPUs: answers travel through files, so that no
collective operation is needed and a slow process holds nobody up.
"""

import json
import os
import time
from collections.abc import Iterator
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
        """Yields numbers below `count`: every one to one process, in order, as they ask."""
        if self.store is None:
            yield from range(count)
            return
        while (number := self.store.add(f"{key}/next", 1) - 1) < count:
            yield number

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
        here, start = self.store.add(f"{key}/here", 1), time.monotonic()
        while here < self.size:
            if time.monotonic() - start > PATIENCE_SECONDS:
                raise TimeoutError(
                    f"{self.size - here} of {self.size} processes did not finish: start the same "
                    "command again to answer what they left"
                )
            time.sleep(POLL_SECONDS)
            here = self.store.add(f"{key}/here", 0)
        # The main process may hold the store itself: it leaves when the others need it no more.
        gone, start = self.store.add(f"{key}/gone", 1), time.monotonic()
        while self.main and gone < self.size and time.monotonic() - start < LEAVING_SECONDS:
            time.sleep(POLL_SECONDS / 4)
            gone = self.store.add(f"{key}/gone", 0)

    def device(self) -> str | None:
        """The GPU of this process; None: where there is one process or no GPU, the model's default
        is right."""
        return None if self.store is None else own_gpu()
