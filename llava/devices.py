"""Models shared out over several devices: where a part computes, and bringing values there."""

from __future__ import annotations

from copy import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


def device_of(module: nn.Module) -> torch.device:
    """The device that `module` computes on.

    accelerate may keep weights elsewhere (then they are on "meta" here) and bring them when the
    module runs; its hook says where that is.
    """
    weight = next(module.parameters(), None)
    if weight is not None and not weight.is_meta:
        return weight.device
    found = [part._hf_hook for part in module.modules() if hasattr(part, "_hf_hook")]
    for hook in [one for hooks in found for one in getattr(hooks, "hooks", [hooks])]:
        if (where := getattr(hook, "execution_device", None)) is not None:
            return torch.empty(0, device=where).device  # "cuda" and 0 become cuda:0
    return torch.device("cpu") if weight is None else weight.device


def empty_like_weights(module: nn.Module) -> Tensor:
    """An empty tensor with the number format and device of a module's weights, for `.to()`."""
    return torch.empty(0, dtype=next(module.parameters()).dtype, device=device_of(module))


def moved(value: Any, device: torch.device, done: dict[int, Tensor] | None = None) -> Any:
    """`value` with all tensors in it on `device`: tensors, dicts, lists, tuples and dataclasses of
    them; anything else stays as it is. What is one tensor there is one tensor here.

    done: id -> what was brought already
    """
    done = {} if done is None else done
    if isinstance(value, Tensor):
        if id(value) not in done:
            done[id(value)] = value.to(device)
        return done[id(value)]
    if isinstance(value, dict):
        there = copy(value)
        there.update((key, moved(own, device, done)) for key, own in value.items())
        return there
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(own, device, done) for own in value))
    if isinstance(value, (list, tuple)):
        return type(value)(moved(own, device, done) for own in value)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.init]
        there = {name: moved(getattr(value, name), device, done) for name in names}
        return replace(value, **there)
    return value
