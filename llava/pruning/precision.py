"""Choosing tokens in the precision of its operands, also where products are cast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager:
    """Inside, products have the type of their operands. Autocast, as in training with
    `--bf16 True`, would make bfloat16 of fp32, whose rounding chooses other tokens than those that
    the model is used with."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
