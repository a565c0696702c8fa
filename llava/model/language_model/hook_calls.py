"""Calls of a pruning method between decoder layers, and what they changed for the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...pruning.tokens import Prefill

#: what layers are told about the tokens beside their hidden states
SEEN_BY_LAYERS = ("index", "position_ids", "valid", "next_position")
#: one value for each token, (B, S) or (B, S, E)
PER_TOKEN = ("index", "position_ids", "visual_index", "patch_index", "valid", "tags", "context")
NOT_WRITTEN = (*PER_TOKEN, "next_position")


@dataclass
class Call:
    """A hook that was called.

    prefill: what it returned
    changed: those of `SEEN_BY_LAYERS` that it replaced
    """

    prefill: Prefill
    changed: frozenset[str]

    @property
    def dropped(self) -> bool:
        """Whether the layers may see other tokens than before."""
        return not self.changed.isdisjoint(("index", "valid"))


def call(hook: Callable[[Prefill], Prefill], prefill: Prefill, name: str) -> Call:
    """Calls `hook`, of the method called `name`, on `prefill`.

    Raises ValueError when it returns values that do not fit one another, or writes into tensors
    that the layers before, their caches and the trace use as well: it has to assign new ones.
    """
    before = {}
    for field in NOT_WRITTEN:
        value = getattr(prefill, field)
        if type(value) is Tensor and value.is_inference():
            value = counted(value)
            setattr(prefill, field, value)
        before[field] = value, version(value)
    states = prefill.hidden_states
    layer, prefill = prefill.layer, hook(prefill)
    if not isinstance(prefill, Prefill):
        raise ValueError(
            f"{name} gave {type(prefill).__name__} back before layer {layer}: a hook returns the "
            "Prefill, changed or not"
        )
    for field, (value, number) in before.items():
        if version(value) != number:
            raise ValueError(
                f"{name} writes into {field} before layer {prefill.layer}, where others use it as "
                f"well: assign a new tensor, as in dataclasses.replace(prefill, {field}=...)"
            )
    changed = [field for field in SEEN_BY_LAYERS if getattr(prefill, field) is not before[field][0]]
    if changed or prefill.hidden_states is not states:
        check(prefill, name)
    return Call(prefill, frozenset(changed))


def version(value: Tensor | None) -> int:
    """How often a tensor was written to, as far as it counts."""
    return 0 if value is None or value.is_inference() else value._version


def counted(value: Tensor) -> Tensor:
    """The same memory as a tensor that counts writes, which those of inference mode do not."""
    with torch.inference_mode(False):
        alias = torch.empty(0, dtype=value.dtype, device=value.device)
        layout = value.storage_offset(), value.size(), value.stride()
        return alias.set_(value.untyped_storage(), *layout)


def check(prefill: Prefill, name: str) -> None:
    """Raises ValueError unless there is one of everything for each token."""
    shape = prefill.hidden_states.shape[:2]
    for field in PER_TOKEN:
        value = getattr(prefill, field)
        if value is not None and value.shape[:2] != shape:
            raise ValueError(
                f"{name} left {field} of shape {tuple(value.shape)} before layer {prefill.layer}, "
                f"where hidden_states are those of {tuple(shape)} tokens"
            )
    if prefill.valid is not None and prefill.valid.dtype != torch.bool:
        raise ValueError(f"{name} left valid of type {prefill.valid.dtype}, it must be torch.bool")
    follows = prefill.next_position
    if follows is not None and follows.shape != shape[:1]:
        raise ValueError(
            f"{name} left next_position of shape {tuple(follows.shape)} for {shape[0]} prompts"
        )
