"""How many kernels a GPU would be asked to run, counted on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Kernels(TorchDispatchMode):
    """Counts operations that write something; views of tensors, and what changes nothing, are free.

    In inference mode a linear layer, a norm and attention count as one, which they are on a GPU;
    elsewhere torch splits norms up for the CPU.
    """

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {storage(x) for x in tensors_of((args, kwargs))}
        made = tensors_of(out)
        if func._schema.is_mutable or any(storage(x) not in given for x in made):
            self.names.append(func._schema.name.split("::")[1])
        return out


def tensors_of(value) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@torch.inference_mode()
def kernels(call) -> list[str]:
    """The names of the operations that `call()` runs."""
    with Kernels() as mode:
        call()
    return mode.names
