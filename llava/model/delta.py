"""Adding a base model to published differences, and the reverse."""

import torch
from torch import Tensor

from ..progress import progress
from ..weight_files import tensors_in, weight_files
from .checkpoint import is_ignored, is_vocabulary

#: weights that a LLaVA model has and its base has not
OWN_PARTS = ("mm_projector", "image_newline", "vision_tower")


def read_weights(folder: str) -> dict[str, Tensor]:
    """All weights of a checkpoint in float16."""
    return {
        name: tensor.to(torch.float16, copy=True)
        for path in progress(weight_files(folder), "reading", "files")
        for name, tensor in tensors_in(path)
        if not is_ignored(name)
    }


def combine(tensors: dict[str, Tensor], base: dict[str, Tensor], sign: int) -> dict[str, Tensor]:
    """`tensors` plus `sign` times `base`, in place.

    A vocabulary that grew is combined on the rows both have. Parts of LLaVA alone stay as they
    are; ValueError for any other weight that the base lacks or has in another shape.
    """
    for name, tensor in tensors.items():
        if name not in base:
            if not any(part in name for part in OWN_PARTS):
                raise ValueError(f"{name} is not in the base model")
            continue
        other = base[name]
        if tensor.shape == other.shape:
            tensor += sign * other
        elif is_vocabulary(name) and tensor.shape[1:] == other.shape[1:]:
            rows = min(len(tensor), len(other))
            tensor[:rows] += sign * other[:rows]
        else:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, in the base model {tuple(other.shape)}"
            )
    return tensors
