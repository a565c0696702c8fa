"""Learned parts of pruning methods on disk: found, read, checked against the model, and written.

A folder of ours holds `model.safetensors` and `config.json` with `pruning_method`, `base_model` and
the hyper-parameters the part was trained with. The layouts in which parts were published (another
weight file, a config copied from the base model) are read as well; no code of a file is ever run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config_file import read_json
from ..playground import trained_part
from ..weight_files import index_names, local_folder, names_in, share_files, tensors_in

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
#: names the files of a part that was saved in several
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
Part = TypeVar("Part", bound=nn.Module)
#: key of config.json that says whose part a folder holds; published folders lack it
METHOD_KEY = "pruning_method"


def part_folder(method: str, given: str | None, model_path: str, option: str) -> str:
    """Folder of the trained part that `method` is to use on the model of `model_path`.

    given:  what the caller named, a folder or a hub repository; None: the part that comes with the
            playground (`llava.playground.trained_part`), which fits the playground's model alone
    option: the option by which a caller names a folder
    Raises FileNotFoundError saying how to get one when there is none.
    """
    folder = trained_part(method, model_path) if given is None else local_folder(given)
    if folder is None:
        raise FileNotFoundError(
            f"{method} needs a trained part that fits {model_path or 'this model'}: name its "
            f"folder with {option}=FOLDER (--pruning-arg {option}=FOLDER), or train one with "
            f"python -m llava.train.train_{method} (see docs/Training.md)"
        )
    return folder


def read_part_config(folder: str, method: str) -> dict:
    """The values of the folder's config.json; {} when it has none.

    Raises ValueError when it belongs to another method or is no JSON.
    """
    path = os.path.join(folder, CONFIG_FILE)
    if not os.path.isfile(path):
        return {}
    values = read_json(path)
    owner = values.get(METHOD_KEY, method)
    if owner != method:
        raise ValueError(f"{folder} holds a trained part of {owner!r}, not of {method!r}")
    return values


def part_files(folder: str, names: Iterable[str] = (WEIGHTS_FILE,)) -> list[str]:
    """The first file among `names` that `folder` has, else those that its index names; [] without.

    Raises FileNotFoundError when the index names one that is missing.
    """
    for name in names:
        if os.path.isfile(path := os.path.join(folder, name)):
            return [path]
    if not os.path.isfile(index := os.path.join(folder, INDEX_FILE)):
        return []
    paths = [os.path.join(folder, name) for name in index_names(index)]
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise FileNotFoundError(f"{index} names a file that is missing: {missing[0]}")
    return paths


def read_part(
    folder: str,
    names: Iterable[str] = (WEIGHTS_FILE,),
    skip: Callable[[str], bool] | None = None,
) -> tuple[str, dict[str, Tensor]]:
    """(path, name -> tensor) of the first file among `names` that `folder` has, or of its index and
    all files that it names.

    Tensors of nested state dicts are called OUTER.INNER; those that `skip` accepts are not read.
    Raises FileNotFoundError when there is no such file, ValueError when it is damaged or holds
    something other than tensors.
    """
    tensors: dict[str, Tensor] = {}
    names = list(names)
    for path in (paths := part_files(folder, names)):
        left_out = filter(skip, names_in(path)) if skip else ()
        tensors |= {name: tensor.clone() for name, tensor in tensors_in(path, left_out)}
    if not paths:
        raise FileNotFoundError(f"{folder} holds no trained part (looked for {', '.join(names)})")
    return paths[0] if len(paths) == 1 else os.path.join(folder, INDEX_FILE), tensors


def build_part(
    make: Callable[[], Part], tensors: dict[str, Tensor], source: str, like: Tensor
) -> Part:
    """The module that `make` returns, frozen and in eval mode, with `tensors` as its weights.

    `make` runs without memory for weights (on the meta device), so the module may not compute any
    while it is made. like: a weight of the model, for device and floating-point type.
    Raises ValueError on missing, unexpected or wrongly shaped tensors.
    """
    with torch.device("meta"):
        module = make()
    check_tensors({name: t.shape for name, t in module.state_dict().items()}, tensors, source)
    placed = {
        name: tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }
    module.load_state_dict(placed, assign=True)
    return module.requires_grad_(False).eval()


def check_tensors(wanted: dict[str, torch.Size], tensors: dict[str, Tensor], source: str) -> None:
    """Raises ValueError unless `tensors` are exactly those of `wanted` (name -> shape)."""
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ValueError(f"{source} lacks {len(missing)} weights, {missing[0]} for one")
    if unexpected := sorted(tensors.keys() - wanted.keys()):
        raise ValueError(
            f"{source} holds {len(unexpected)} weights that have no place, {unexpected[0]} for one"
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{source} does not fit this model: {name} has shape "
                f"{tuple(tensors[name].shape)}, the model needs {tuple(shape)}"
            )


def save_part(
    folder: str, method: str, tensors: dict[str, Tensor], base_model: str, **hyper_parameters
) -> None:
    """Writes a trained part: `model.safetensors`, and config.json with everything else.

    base_model: name or folder of the model the part was trained on; a folder is stored by its name
                alone, so that nothing points into the machine of the training
    """
    os.makedirs(folder, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(tensors, os.path.join(folder, WEIGHTS_FILE), metadata={"format": "pt"})
    share_files(folder)
    if os.path.isdir(base_model):
        base_model = os.path.basename(os.path.realpath(base_model))
    values = {METHOD_KEY: method, "base_model": base_model, **hyper_parameters}
    with open(os.path.join(folder, CONFIG_FILE), "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
