"""Parameter groups, and Muon for matrices beside AdamW for everything else."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

from .llava_family import LlavaFamily

DECODER_MATRIX = re.compile(r"(^|\.)model\.layers\.\d+\..*weight$")


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    mm_projector_lr: float | None = None,
    mm_vision_tower_lr: float | None = None,
    part_of: Callable[[str], str] | None = None,
) -> list[dict]:
    """Optimizer groups of all trainable parameters.

    Two groups, with weight decay and without (norms and biases); two more for the projector, and
    for the vision tower, if they have their own learning rate. None of them is empty.
    part_of: as of a `Family`; None: LLaVA's
    """
    part_of = part_of or LlavaFamily().part_of
    own_lr = {"projector": mm_projector_lr, "tower": mm_vision_tower_lr}
    own_lr = {part: lr for part, lr in own_lr.items() if lr is not None}
    no_decay = undecayed_names(model)
    parameters: dict[str, list] = {part: [] for part in ("", *own_lr)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            parameters[part if part in own_lr else ""].append((name, parameter))
    groups = []
    for part, members in parameters.items():
        lr = {"lr": own_lr[part]} if part else {}
        decayed = [p for name, p in members if name not in no_decay]
        rest = [p for name, p in members if name in no_decay]
        groups.append({"params": decayed, "weight_decay": weight_decay, **lr})
        groups.append({"params": rest, "weight_decay": 0.0, **lr})
    # DeepSpeed drops empty groups, and a scheduler made before that counts them.
    return [group for group in groups if group["params"]]


def undecayed_names(model: nn.Module) -> set[str]:
    """Names of biases and of the parameters of norm layers."""
    names = {name for name, _ in model.named_parameters() if "bias" in name}
    for prefix, module in model.named_modules():
        if type(module).__name__.endswith("Norm"):
            names |= {f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)}
    return names


def decoder_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable two-dimensional weights inside decoder layers."""
    return [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and p.ndim == 2 and DECODER_MATRIX.search(name)
    ]


def split_matrices(groups: list[dict], matrices: list[nn.Parameter]) -> tuple[list, list]:
    """The groups cut in two: those of `matrices`, and those of all other parameters."""
    chosen = {id(p) for p in matrices}

    def part(inside: bool) -> list[dict]:
        cut = [
            {**group, "params": [p for p in group["params"] if (id(p) in chosen) == inside]}
            for group in groups
        ]
        return [group for group in cut if group["params"]]

    return part(True), part(False)


class MuonWith(torch.optim.Optimizer):
    """Muon on `matrix_groups` and `rest` (a finished optimizer) on other parameters, as one.

    Updates of Muon are scaled to the size of AdamW's, so one learning rate suits both.
    """

    def __init__(self, matrix_groups: list[dict], rest: torch.optim.Optimizer, lr: float):
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"matrix_optim muon needs torch.optim.Muon (torch >= 2.9), this is torch "
                f"{torch.__version__}; choose matrix_optim same"
            )
        if not matrix_groups:
            raise ValueError("matrix_optim muon found no trainable matrix in the decoder layers")
        self.parts = {
            "muon": torch.optim.Muon(matrix_groups, lr=lr, adjust_lr_fn="match_rms_adamw"),
            "rest": rest,
        }
        super().__init__([p for part in self.parts.values() for p in _parameters(part)], {})
        self._share()

    def _share(self) -> None:
        # The very dicts of the parts: a scheduler that changes them changes the parts.
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for part in self.parts.values():
            part.step()
        return loss

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state_dict[name])
        self._share()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]
