"""Twigs on disk, in the published layouts and ours: which names mean what, and whose a twig is.

Both methods that grow a twig publish the same tensors of its layers, norm and head, numbered from
0; TwigVLM++ adds the two gates of its pruning head. Its training saves copies of the base model's
layers along, and so splits the file: those copies are left unread.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from torch import Tensor

from ..weight_files import names_in
from .learned import part_files, read_part

#: how the release calls the pruning head, sometimes with "model." in front, and how we do
PUBLISHED_HEAD, OUR_HEAD = "leaf_attention_module.", "pruning_head."
#: what begins the names of the base model's copies
BASE_COPIES = ("model.bkb_layers.", "model.bkb_norm.", "bkb_lm_head.")


def published_name(name: str) -> str:
    """Name in a checkpoint of a tensor of a twig."""
    if name.startswith("head."):
        return f"lm_{name}"
    if name.startswith(OUR_HEAD):
        return PUBLISHED_HEAD + name.removeprefix(OUR_HEAD)
    return f"model.{name}"


def our_name(name: str) -> str:
    """Name in a twig of a tensor of a checkpoint."""
    name = name.removeprefix("model.")
    if name.startswith(PUBLISHED_HEAD):
        return OUR_HEAD + name.removeprefix(PUBLISHED_HEAD)
    return name.replace("lm_head.", "head.")


def read_twig(folder: str) -> tuple[str, dict[str, Tensor]]:
    """(file, name in the twig -> tensor) of the twig in `folder`. Errors as of `read_part`."""
    path, tensors = read_part(folder, skip=lambda name: name.startswith(BASE_COPIES))
    return path, {our_name(name): tensor for name, tensor in tensors.items()}


def has_pruning_head(names: Iterable[str]) -> bool:
    """Whether names of tensors, in a twig or in a checkpoint, include those of a pruning head."""
    return any(our_name(name).startswith(OUR_HEAD) for name in names)


def holds_pruning_head(folder: object) -> bool:
    """Whether `folder` is one, here, with a twig of TwigVLM++ in it. Of weights only the names are
    read."""
    if not isinstance(folder, str) or not os.path.isdir(folder):
        return False
    return any(has_pruning_head(names_in(path)) for path in part_files(folder))


def check_owner(path: str, names: Iterable[str], with_head: bool) -> None:
    """Raises ValueError when a twig with these names is not of the method that wants to use it.

    with_head: that method is TwigVLM++
    """
    if has_pruning_head(names) == with_head:
        return
    raise ValueError(
        f"{path} holds a twig of TwigVLM, without the gates of a pruning head ({PUBLISHED_HEAD}"
        "q_gate.weight, ...): use the method twigvlm"
        if with_head
        else f"{path} holds a twig of TwigVLM++, with a pruning head ({PUBLISHED_HEAD}...): use "
        "the method twigvlm_plus"
    )
