"""Parameters that DeepSpeed's ZeRO-3 has split between the processes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor


def is_split(parameter: Tensor) -> bool:
    """Whether this process holds only its share of the parameter, and `.data` holds nothing."""
    return hasattr(parameter, "ds_id")


def whole(parameters: Iterable[Tensor], change: bool = False) -> AbstractContextManager:
    """A block in which the parameters are whole; every process must enter it.

    change: the block writes into them, the same values in every process
    """
    split = [p for p in parameters if is_split(p)]
    if not split:
        return nullcontext()
    from deepspeed import zero  # only a parameter split by DeepSpeed gets here

    return zero.GatheredParameters(split, modifier_rank=0 if change else None)
