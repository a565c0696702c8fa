"""What the options of methods may be: their annotations, held against values that were given, and
the checks that several methods make."""

from __future__ import annotations

import math
from collections import abc
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

SEQUENCES = (abc.Sequence, list, tuple)
#: values that are checked: those that command lines and requests are made of
PLAIN = (bool, int, float, str, list, tuple, NoneType)


def type_of(method: type, option: str) -> Any:
    """The type of an option; `object`, which no plain value is of, where its annotation means
    nothing outside of its file, as a package may write it."""
    try:
        return get_type_hints(method)[option]
    except Exception:  # reading it runs it
        return object


def alternatives(kind: Any) -> tuple:
    """The types that a union allows, else the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def fits(value: object, kind: Any) -> bool:
    """Whether a plain value, its lists as tuples, is of a type."""
    if len(kinds := alternatives(kind)) > 1:
        return any(fits(value, one) for one in kinds)
    if get_origin(kind) in SEQUENCES:
        (inner, *_) = get_args(kind)
        return isinstance(value, tuple) and all(fits(one, inner) for one in value)
    if type(value) is float and not math.isfinite(value):  # no weight, share or count is
        return False
    return type(value) is kind or (kind is float and type(value) is int)


def is_plain(kind: Any) -> bool:
    """Whether plain values are all that a type is of, so that they can be held against it."""
    if len(kinds := alternatives(kind)) > 1:
        return all(map(is_plain, kinds))
    if get_origin(kind) in SEQUENCES:
        return is_plain(get_args(kind)[0])
    return kind in (bool, int, float, str, NoneType)


def in_words(kind: Any) -> str:
    """The first of the types that an option takes."""
    kinds = [one for one in alternatives(kind) if one is not NoneType] or [NoneType]
    if get_origin(kinds[0]) in SEQUENCES:
        return f"a list, each {in_words(get_args(kinds[0])[0])}"
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
    return words.get(kinds[0], "no plain value")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError unless the value of the option `name` is one of the choices."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}, choose from {', '.join(choices)}")


def check_share(name: str, value: float | None) -> None:
    """Raises ValueError unless the value of the option `name` is a share; None: not given."""
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{name} ({value}) must lie between 0 and 1")


def check_types(method: type, options: Mapping[str, object]) -> None:
    """Raises ValueError on plain values of another type than the options of a method have. 0 and 1
    are False and True as well; what is not plain, the value or its type, the method knows."""
    for name, value in options.items():
        if type(value) not in PLAIN:
            continue
        kind = type_of(method, name)
        if not is_plain(kind) or (bool in alternatives(kind) and value in (0, 1)):
            continue
        if not fits(tuple(value) if isinstance(value, list) else value, kind):
            raise ValueError(f"{name} ({value!r}) must be {in_words(kind)}")


def check_saved(method: type, values: Mapping[str, object], source: str) -> None:
    """Likewise for options that a file brings; source: its name, with which errors begin."""
    for name, value in values.items():
        if isinstance(value, dict):  # which no option is, so that `check_types` leaves it alone
            raise ValueError(f"{source}: {name} must be {in_words(type_of(method, name))}")
    try:
        check_types(method, values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
