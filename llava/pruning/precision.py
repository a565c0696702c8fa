"""Choosing tokens in the precision of its operands, also where products are cast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager:
    """Inside, products have the type of their operands. Autocast, as in training with
    `--bf16 True`, would make bfloat16 of fp32, whose rounding chooses other tokens than those that
    the model is used with."""
    return torch.autocast(device.type, enabled=False) if casting(device) else nullcontext()


def casting(device: torch.device) -> torch.autocast | None:
    """What `full_precision` switches off, to be switched on again inside it; None: nothing."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, torch.get_autocast_dtype(kind))
    return None
