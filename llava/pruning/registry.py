"""The table of methods: those of this package, and those that installed packages bring.

A package brings a method by an entry point of the group `llava.pruning`, named like the method:

    [project.entry-points."llava.pruning"]
    uniform = "its_module:Uniform"

Packages are looked for when a name is asked for that is none of ours, and imported when their
method is used or the options of all methods are listed. One that cannot be used stays in the table,
and says why when somebody uses it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, MutableMapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import ClassVar

from ..spelling import unknown
from .base import Pruner
from .published import Published

GROUP = "llava.pruning"
#: what a method may be called: its name becomes part of options, folders and requests
NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
#: default and default factory of a field that has none
NEITHER = (MISSING, MISSING)


class Unusable(Pruner):
    """Stands for a method of another package that cannot be used; making one says why.

    cause: the exception behind it, if there is one
    """

    reason: ClassVar[str]
    cause: ClassVar[BaseException | None] = None

    def __init__(self, *_, **__):
        raise ValueError(self.reason) from self.cause


class Methods(MutableMapping[str, type[Pruner]]):
    """Name -> class of every method, ours first. Setting an entry adds a method to ours.

    own: the methods that no other package brings
    """

    def __init__(self, *own: type[Pruner]):
        self.own = {method.name: method for method in own}
        self._loaded: dict[str, type[Pruner]] = {}

    @cached_property
    def offers(self) -> dict[str, list[EntryPoint]]:
        """Name -> the entry points that installed packages have for it, one unless they clash.

        Says once which of them are left out: those that are called like a method of ours, or cannot
        be the name of a method.
        """
        offers: dict[str, list[EntryPoint]] = {}
        for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
            if point.name in self.own:
                why = "that is one of llava's own, which is used"
            elif not NAME.fullmatch(point.name):
                why = "a name consists of small letters, digits and _, 32 at most, a letter first"
            else:
                offers.setdefault(point.name, []).append(point)
                continue
            warnings.warn(f"{source(point)} is left out: {why}", stacklevel=2)
        return offers

    def __getitem__(self, name: str) -> type[Pruner]:
        if name in self.own:
            return self.own[name]
        if name not in self._loaded:
            self._loaded[name] = load(self.offers[name])
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self.offers  # without loading it

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from (name for name in self.offers if name not in self.own)

    def __len__(self) -> int:
        return len(self.own.keys() | self.offers.keys())

    def __setitem__(self, name: str, method: type[Pruner]) -> None:
        self.own[name] = method

    def __delitem__(self, name: str) -> None:
        del self.own[name]

    def usable(self, name: str) -> type[Pruner]:
        """The class of the method. Raises ValueError, with the choices, on an unknown name, and
        with the cause where the package that brings it cannot be used."""
        if name not in self:
            raise ValueError(self.unknown(name))
        method = self[name]
        if issubclass(method, Unusable):
            raise ValueError(method.reason) from method.cause
        return method

    def unknown(self, name: str) -> str:
        """What to say to someone who names a method that there is not."""
        names = re.split(r"[\s,]+", name.strip())
        if len(names) > 1 and all(part in self for part in names):
            return (
                f"one method is taken here, not {name!r}: {'+'.join(names[:2])} is two in a row, "
                f"and llava compare --methods {' '.join(names)} compares them"
            )
        return unknown("pruning method", name, self)


def load(points: list[EntryPoint]) -> type[Pruner]:
    """The class behind the entry points of one name, `Unusable` where none can be used."""
    point, *others = points
    if others:
        offered = " and ".join(source(one) for one in points)
        return unusable(point, f"{offered} have the same name: uninstall one of these packages")
    try:
        method = point.load()
    except (Exception, SystemExit) as error:  # whatever a package does when it is imported
        said = " ".join(str(error).split())
        reason = f"cannot be loaded: {type(error).__name__}: {said}"
        return unusable(point, f"{source(point)} {reason}", error)
    if fault := fault_of(method, point.name):
        return unusable(point, f"{source(point)} {fault}")
    return method


def fault_of(method: object, name: str) -> str | None:
    """What a package offers as the method called `name` instead of one: whoever lists the options
    of all methods relies on what is settled here."""
    if not (isinstance(method, type) and issubclass(method, Pruner)):
        return "is no subclass of llava.pruning.Pruner"
    if method.name != name:
        return f"calls itself {method.name!r}: name both alike"
    if not isinstance(method.published, Published):
        return f"has published = {method.published!r}, which must be a llava.pruning.Published"
    options: tuple[Field, ...] = fields(method) if is_dataclass(method) else ()
    if bare := [f.name for f in options if f.init and (f.default, f.default_factory) == NEITHER]:
        return f"has no default for its option {', '.join(bare)}"
    return None


def source(point: EntryPoint) -> str:
    """A method of another package, in words: what it is called, and where it comes from."""
    package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown package"
    return f"pruning method {point.name!r} of {package} ({point.value})"


def unusable(point: EntryPoint, reason: str, cause: BaseException | None = None) -> type[Unusable]:
    return type("Unusable", (Unusable,), {"name": point.name, "reason": reason, "cause": cause})
