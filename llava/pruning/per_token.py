"""Values that there is one of for each token: which fields hold them, and how all follow a change.

A dataclass marks such a field, `field(metadata=per_token())`; it may hold a tensor, a dict of
tensors, or None. What is done to the tokens is then done to all of them at once by `mapped`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor

MARK = "token_axis"


def per_token(axis: int = 1) -> dict[str, int]:
    """The metadata of a dataclass field that holds values with the tokens along `axis`."""
    return {MARK: axis}


def mapped(
    carrier: Any, change: Callable[[Tensor, int], Tensor], without: Collection[str] = ()
) -> dict[str, Any]:
    """Field -> its value with every tensor `x` in it replaced by `change(x, axis)`, for all marked
    fields of the dataclass `carrier` but those named in `without`."""
    marked = [f for f in fields(carrier) if MARK in f.metadata and f.name not in without]
    return {f.name: each(getattr(carrier, f.name), change, f.metadata[MARK]) for f in marked}


def each(value: Any, change: Callable[[Tensor, int], Tensor], axis: int = 1) -> Any:
    """`value` with every tensor `x` in it replaced by `change(x, axis)`."""
    if isinstance(value, dict):
        return {name: change(own, axis) for name, own in value.items()}
    return None if value is None else change(value, axis)


def tensors_of(carrier: Any) -> dict[str, Tensor]:
    """What there is in the marked fields of a dataclass, by name; in dicts "field[name]"."""
    found: dict[str, Tensor] = {}
    for name in (f.name for f in fields(carrier) if MARK in f.metadata):
        value = getattr(carrier, name)
        if isinstance(value, dict):
            found |= {f"{name}[{key!r}]": own for key, own in value.items()}
        elif value is not None:
            found[name] = value
    return found


def at(index: Tensor) -> Callable[[Tensor, int], Tensor]:
    """The change that takes the tokens at `index` (B, T) of every row."""

    def gather(x: Tensor, axis: int) -> Tensor:
        if x.ndim == 2:
            return x.gather(1, index)
        ones = (1,) * (axis - 1), (1,) * (x.ndim - axis - 1)
        places = index.view(index.shape[0], *ones[0], index.shape[1], *ones[1])
        shape = (*x.shape[:axis], index.shape[1], *x.shape[axis + 1 :])
        return x.gather(axis, places.expand(shape))

    return gather


def with_zeros(count: int) -> Callable[[Tensor, int], Tensor]:
    """The change that puts `count` zeros behind the tokens."""

    def pad(x: Tensor, axis: int) -> Tensor:
        return F.pad(x, (0, 0) * (x.ndim - axis - 1) + (0, count))

    return pad
