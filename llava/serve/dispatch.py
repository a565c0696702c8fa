"""The controller's table of workers, and which of them gets the next request."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from ..constants import CONTROLLER_HEART_BEAT_EXPIRATION
from .errors import ServeError
from .limits import WORKERS
from .protocol import WorkerStatus

METHODS = ("lottery", "shortest_queue")
LEAST_SPEED = 1e-4  # workers slower than this, all together, are no workers


@dataclass
class Worker:
    """One entry. last_heart_beat: on the monotonic clock."""

    model_names: list[str]
    speed: float
    queue_length: int
    check_heart_beat: bool
    last_heart_beat: float


class WorkerTable:
    """Workers by address.

    method: "lottery" draws a worker with odds in proportion to its speed; "shortest_queue" takes
            the one with the smallest queue for its speed, the first one of several
    """

    def __init__(self, method: str = "shortest_queue"):
        if method not in METHODS:
            raise ValueError(f"unknown dispatch method {method!r}, choose from {METHODS}")
        self.method = method
        self.workers: dict[str, Worker] = {}

    def register(self, address: str, status: WorkerStatus, check_heart_beat: bool) -> None:
        if address not in self.workers and len(self.workers) >= WORKERS:
            raise ServeError("busy", f"The controller already has {WORKERS} workers.")
        self.workers[address] = Worker(
            list(status.model_names),
            status.speed,
            status.queue_length,
            check_heart_beat,
            time.monotonic(),
        )

    def beat(self, address: str, queue_length: int) -> bool:
        """Notes a sign of life; False when the worker has to register first."""
        worker = self.workers.get(address)
        if worker is None:
            return False
        worker.queue_length, worker.last_heart_beat = queue_length, time.monotonic()
        return True

    def drop(self, address: str) -> None:
        self.workers.pop(address, None)

    def drop_silent(self) -> list[str]:
        """Drops the workers whose heart beat is overdue, and returns their addresses."""
        latest = time.monotonic() - CONTROLLER_HEART_BEAT_EXPIRATION
        silent = [
            address
            for address, worker in self.workers.items()
            if worker.check_heart_beat and worker.last_heart_beat < latest
        ]
        for address in silent:
            self.drop(address)
        return silent

    def models(self) -> list[str]:
        return sorted({name for worker in self.workers.values() for name in worker.model_names})

    def choose(self, model: str) -> str | None:
        """Address of the worker that gets the next request for `model`; None without one."""
        fitting = {
            address: worker
            for address, worker in self.workers.items()
            if model in worker.model_names and worker.speed > 0
        }
        if sum(worker.speed for worker in fitting.values()) < LEAST_SPEED:
            return None
        if self.method == "lottery":
            speeds = [worker.speed for worker in fitting.values()]
            return random.choices(list(fitting), speeds)[0]
        address = min(fitting, key=lambda name: fitting[name].queue_length / fitting[name].speed)
        fitting[address].queue_length += 1  # until its next heart beat says more
        return address
