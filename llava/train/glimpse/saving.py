"""A trained glimpse as it was published: `new_modules_gp.pt`, and the config of the whole model."""

from __future__ import annotations

import json
import os

import torch
from torch import Tensor

from llava.checkpoint_kind import checkpoint_config
from llava.pruning.learned import CONFIG_FILE, METHOD_KEY

WEIGHTS_FILE = "new_modules_gp.pt"
#: what the published file holds, one state dict each where it is no tensor
ENTRIES = ("learnable_embeddings", "le_proj", "le_norm", "attn_fuser")


def save_released(
    folder: str, method: str, tensors: dict[str, Tensor], base_model: str, **hyper_parameters
) -> None:
    """As `llava.pruning.learned.save_part`, in the published layout.

    config.json holds all values of the base model, whose config it replaces there, with the
    `model_type` of the published programs; what ours adds are `pruning_method` and `base_model`.
    """
    os.makedirs(folder, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    torch.save(nested(tensors), os.path.join(folder, WEIGHTS_FILE))
    values = checkpoint_config(base_model)
    values.pop("architectures", None)  # the folder is no model
    kind = values.get("model_type", "")
    if os.path.isdir(base_model):
        base_model = os.path.basename(os.path.realpath(base_model))
    own = {"model_type": f"{kind}_gp", METHOD_KEY: method, "base_model": base_model}
    own |= {"tokenizer_padding_side": "left"} if "tokenizer_padding_side" in values else {}
    with open(os.path.join(folder, CONFIG_FILE), "w", encoding="utf-8") as file:
        json.dump({**values, **own, **hyper_parameters}, file, indent=2)
        file.write("\n")


def nested(tensors: dict[str, Tensor]) -> dict[str, Tensor | dict[str, Tensor]]:
    """Tensors called OUTER.INNER as a state dict for each OUTER."""
    found: dict[str, Tensor | dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        outer, _, inner = name.partition(".")
        if outer not in ENTRIES:
            raise ValueError(f"{name} is no weight of a glimpse, those are {', '.join(ENTRIES)}")
        if inner:
            found.setdefault(outer, {})[inner] = tensor
        else:
            found[outer] = tensor
    return found
