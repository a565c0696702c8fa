"""What may be absent, where it has to be there: one sentence instead of an error about `None`."""

from __future__ import annotations

from typing import TypeVar

from .interfaces import LanguageModel, VisionTower

T = TypeVar("T")


def required(value: T | None, otherwise: str) -> T:
    """`value`; ValueError that says `otherwise` where it is None."""
    if value is None:
        raise ValueError(otherwise)
    return value


def tower_of(model: LanguageModel, reader: str) -> VisionTower:
    """The vision tower of a model; ValueError where it has none. reader: who needs one."""
    return required(model.get_vision_tower(), f"{reader} needs a model with a vision tower")


def assigned(module: T | None, name: str) -> T:
    """The trained part of the method `name`; ValueError where it was not loaded yet."""
    return required(module, f"{name} has its trained part once it is assigned to a model")
