"""Work on several answers in lockstep: what each of them asks for next is done for all at once.

A step of one answer is a generator. It yields what has to be computed, is sent the result, and
returns what it found. Run alone it is a function like any other; run together with those of other
answers, which ask for the same in the same order, weights are read once for all, and the host waits
for the device once. Nothing is padded: the tokens of the answers stand one behind the other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..pruning.branches import Branches
from .kv_cache import KVCache

Found = TypeVar("Found")


class Request(Protocol):
    """Something that has to be computed."""

    @staticmethod
    def answer(asked: Sequence[Any]) -> list[Any]:
        """The results of requests of this kind, one from each answer."""


#: yields requests, is sent their results, and returns what it found
Work = Generator[Request, Any, Found]


@torch.no_grad()
def together(works: Sequence[Work[Found]]) -> list[Found]:
    """What each of these returns; they ask for the same kinds of things in the same order, though
    some may have all they want before others."""
    asked = {number: next(work) for number, work in enumerate(works)}
    found: dict[int, Found] = {}
    while asked:
        requests = list(asked.values())
        results = type(requests[0]).answer(requests)
        for number, result in zip(list(asked), results, strict=True):
            try:
                asked[number] = works[number].send(result)
            except StopIteration as end:
                found[number] = end.value
                del asked[number]
    return [found[number] for number in range(len(works))]


def alone(work: Work[Found]) -> Found:
    return together([work])[0]


@dataclass
class Layers:
    """Decoder layers on the tokens x (1, q, D) of an answer that follow those in its cache.

    step:       a `DecodeStep`
    branches:   of the tokens, where they are nodes of a tree
    of_several: the answer is one of several that grow together
    """

    step: Any
    layers: Iterable[nn.Module]
    x: Tensor
    cache: KVCache
    branches: Branches | None = None
    of_several: bool = False

    @staticmethod
    def answer(asked: Sequence[Layers]) -> list[Tensor]:
        first = asked[0]
        if first.of_several:
            return first.step.several(first.layers, asked)
        return [first.step(first.layers, first.x, first.cache, branches=first.branches)]


@dataclass
class Tokens:
    """A function of every token of x (1, q, D) by itself, (1, n, D) -> (1, n, V)."""

    function: Callable[[Tensor], Tensor]
    x: Tensor

    @staticmethod
    def answer(asked: Sequence[Tokens]) -> list[Tensor]:
        sizes = [own.x.shape[1] for own in asked]
        whole = torch.cat([own.x for own in asked], dim=1) if len(asked) > 1 else asked[0].x
        return list(asked[0].function(whole).split(sizes, dim=1))


@dataclass
class Numbers:
    """The values of whole numbers (n,) on the host, which waits for the device."""

    values: Tensor

    @staticmethod
    def answer(asked: Sequence[Numbers]) -> list[list[int]]:
        values = [own.values for own in asked]
        numbers = (torch.cat(values) if len(values) > 1 else values[0]).tolist()
        found = []
        for own in asked:
            found.append(numbers[: len(own.values)])
            del numbers[: len(own.values)]
        return found
