"""Watching methods of objects from outside, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def wrapped(methods: list[tuple[object, str, Callable[[Callable], Callable]]]) -> Iterator[None]:
    """Puts `wrapper(function)` in place of methods inside the block: (object, name, wrapper).

    The classes are changed, not the objects: where images have grids of their own, a pruning method
    runs as a copy for every grid, and the copies are to be seen as well.
    """
    before = []
    try:
        for owner, name, wrapper in methods:
            cls = type(owner)
            before.append((cls, name, vars(cls).get(name)))
            setattr(cls, name, wrapper(getattr(cls, name)))
        yield
    finally:
        for cls, name, own in reversed(before):
            if own is None:
                delattr(cls, name)  # what it inherits shows again
            else:
                setattr(cls, name, own)
