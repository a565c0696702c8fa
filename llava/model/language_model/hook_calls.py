"""Calls of a pruning method between decoder layers, and what they changed for the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...pruning.counts import counted, version
from ...pruning.per_token import each, mapped, tensors_of
from ...pruning.precision import full_precision
from ...pruning.prefill import Prefill

#: what layers are told about the tokens beside their hidden states
SEEN_BY_LAYERS = (
    "index",
    "position_ids",
    "valid",
    "key_bias",
    "position_bias",
    "asking",
    "next_position",
)
#: may be written to in place
WRITTEN = "hidden_states"


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
    count_writes(prefill)
    before = {field: (value, version(value)) for field, value in watched(prefill).items()}
    seen = {field: getattr(prefill, field) for field in SEEN_BY_LAYERS}
    states = prefill.hidden_states
    layer = prefill.layer
    with full_precision(states.device):
        prefill = hook(prefill)
    if not isinstance(prefill, Prefill):
        raise ValueError(
            f"{name} gave {type(prefill).__name__} back before layer {layer}: a hook returns the "
            "Prefill, changed or not"
        )
    for field, (value, number) in before.items():
        if version(value) != number:
            own = field.partition("[")[0]
            raise ValueError(
                f"{name} writes into {field} before layer {prefill.layer}, where others use it as "
                f"well: assign a new tensor, as in dataclasses.replace(prefill, {own}=...)"
            )
    changed = [field for field in SEEN_BY_LAYERS if getattr(prefill, field) is not seen[field]]
    if changed or prefill.hidden_states is not states:
        check(prefill, name)
    return Call(prefill, frozenset(changed))


def watched(prefill: Prefill) -> dict[str, Tensor]:
    """What a hook may not write to, by name."""
    found = tensors_of(prefill)
    del found[WRITTEN]
    if prefill.next_position is not None:
        found["next_position"] = prefill.next_position
    return found


def count_writes(prefill: Prefill) -> None:
    """Makes what `watched` returns count writes, which tensors of inference mode do not."""
    if not any(value.is_inference() for value in watched(prefill).values()):
        return
    values = mapped(prefill, lambda x, _: counted(x), without=(WRITTEN,))
    values["next_position"] = each(prefill.next_position, lambda x, _: counted(x))
    known = prefill.what_is_known()
    for field, value in values.items():
        setattr(prefill, field, value)
    prefill.know(known.counts, known.hides, known.left)


def check(prefill: Prefill, name: str) -> None:
    """Raises ValueError unless there is one of everything for each token."""
    shape = prefill.hidden_states.shape[:2]
    for field, value in tensors_of(prefill).items():
        if value.shape[:2] != shape:
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
