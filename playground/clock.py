"""What trainings against the clock share: precision, a step, a log line, a state that survives a
kill."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from llava.model.placement import cpu_multiplies_bfloat16


def half_precision() -> torch.autocast:
    """Where matrices are multiplied in bf16, if this CPU does that."""
    return torch.autocast("cpu", torch.bfloat16, enabled=cpu_multiplies_bfloat16())


def descend(
    loss: Tensor, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], rate: float
) -> None:
    """One step of all optimizers down the gradient of `loss`; that of `model` is clipped to length
    1. A group of parameters with a "rate" of its own goes so many times as fast."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def write_line(line: dict, file: Path) -> None:
    """Prints a line of JSON and appends it to the log."""
    text = json.dumps(line)
    print(text, flush=True)
    with open(file, "a") as log:
        log.write(text + "\n")


def save_state(
    file: Path,
    modules: dict[str, nn.Module],
    optimizers: Iterable[torch.optim.Optimizer],
    step: int,
    spent: float,
) -> None:
    """Writes the state in one piece: a kill leaves the earlier one. spent: seconds of training"""
    state = {name: module.state_dict() for name, module in modules.items()}
    state |= {"optimizers": [o.state_dict() for o in optimizers], "step": step, "spent": spent}
    part = file.with_suffix(".part")
    torch.save(state, part)
    part.replace(file)


def resume(
    file: Path, modules: dict[str, nn.Module], optimizers: Iterable[torch.optim.Optimizer]
) -> tuple[int, float]:
    """Takes up the state of a file; returns steps and seconds so far, (0, 0.0) where there is
    none."""
    if not file.exists():
        return 0, 0.0
    state = torch.load(file, weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state[name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["spent"]
