"""Weights on disk: reading and writing checkpoint folders, filling a model, merging LoRA.

Tensors are read one at a time (`llava.weight_files`), so that filling a model needs little more
memory than the model itself.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..weight_files import tensors_in

#: (index file, single file), in order of preference
WEIGHT_FILES = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
#: recomputed by the model, saved by some versions of other libraries
IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "embeddings.position_ids")
TOWER_PREFIX = "model.vision_tower."
#: bytes per file of the checkpoints we write
SHARD_BYTES = 5 * 10**9


def weight_files(folder: str, use_safetensors: bool | None = None) -> list[str]:
    """Paths of the files that hold the model's weights: safetensors if present, else `.bin`.

    use_safetensors: True takes no `.bin`, False no safetensors
    Raises FileNotFoundError when there are none or the index names one that is missing.
    """
    kinds = [
        pair
        for pair in WEIGHT_FILES
        if use_safetensors is None or pair[1].endswith(".safetensors") is bool(use_safetensors)
    ]
    for index, single in kinds:
        if os.path.isfile(path := os.path.join(folder, index)):
            with open(path, encoding="utf-8") as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
            paths = [os.path.join(folder, name) for name in names]
            if missing := [
                name for name, p in zip(names, paths, strict=True) if not os.path.isfile(p)
            ]:
                raise FileNotFoundError(f"{path} names missing files: {', '.join(missing)}")
            return paths
        if os.path.isfile(path := os.path.join(folder, single)):
            return [path]
    raise FileNotFoundError(
        f"{folder} holds no model weights (looked for "
        f"{', '.join(name for pair in kinds for name in pair)}"
        f"{'' if use_safetensors is None else f'; use_safetensors is {use_safetensors}'})"
    )


def read_tensors(folder: str, name: str) -> dict[str, Tensor]:
    """All tensors of `<name>.safetensors` or `<name>.bin` in `folder`; {} when neither exists."""
    for suffix in (".safetensors", ".bin"):
        if os.path.isfile(path := os.path.join(folder, name + suffix)):
            return {key: tensor.clone() for key, tensor in tensors_in(path)}
    return {}


def is_ignored(name: str) -> bool:
    return name.endswith(IGNORED_SUFFIXES)


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts `tensor` in the place of the parameter or buffer `name`, keeping `requires_grad`."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    old = getattr(module, leaf)
    if isinstance(old, nn.Parameter):
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = tensor


class Filler:
    """Fills a model that was built on the meta device, and says what was missing or left over.

    dtype, device: of the floating-point weights in the finished model
    """

    #: kind of files that `add_folder` reads, as in `weight_files`
    use_safetensors: bool | None = None

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.model, self.dtype, self.device = model, dtype, device
        self.wanted = dict(model.state_dict(keep_vars=True))
        self.filled: set[str] = set()
        self.unexpected: list[str] = []

    def add(self, name: str, tensor: Tensor, source: str, fit: bool = False) -> None:
        """One weight; ignored when an earlier source gave it, an error when its shape is wrong.

        fit: a vocabulary of another size is cut or extended instead
        """
        if name in self.filled or is_ignored(name):
            return
        if name not in self.wanted:
            if not name.startswith(TOWER_PREFIX):
                self.unexpected.append(name)
            return
        shape = self.wanted[name].shape
        if tensor.shape != shape and fit and is_vocabulary(name):
            tensor = fit_rows(tensor, shape[0])
        if tensor.shape != shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, "
                f"the config asks for {tuple(shape)}"
            )
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        set_tensor(self.model, name, tensor.to(self.device, dtype, copy=True))
        self.filled.add(name)

    def add_folder(self, folder: str, fit: bool = False) -> None:
        """Every weight of a checkpoint folder."""
        for path in weight_files(folder, self.use_safetensors):
            for name, tensor in tensors_in(path, skip=self.filled):
                self.add(name, tensor, path, fit)

    def missing(self) -> list[str]:
        """Weights nobody gave."""
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
        if not getattr(self.model.config, "tie_word_embeddings", False):
            tied = set()
        return [name for name in self.wanted if name not in self.filled | tied]

    def finish(self, source: str) -> None:
        """Raises ValueError on missing weights, warns about those nobody asked for."""
        if missing := [name for name in self.missing() if not name.startswith(TOWER_PREFIX)]:
            raise ValueError(f"{source} lacks {len(missing)} weights: {_some(missing)}")
        if self.unexpected:
            warnings.warn(
                f"{source} holds {len(self.unexpected)} weights the model has no place for, they "
                f"are not used: {_some(self.unexpected)}",
                stacklevel=2,
            )
        if getattr(self.model.config, "tie_word_embeddings", False):
            self.model.tie_weights()


def is_vocabulary(name: str) -> bool:
    """Whether the weight has one row per token of the vocabulary."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def fit_rows(tensor: Tensor, count: int) -> Tensor:
    """The first `count` rows; rows that are lacking become the mean, as training starts them."""
    mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor[:count], mean.expand(max(count - tensor.shape[0], 0), -1)])


def _some(names: list[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def clean_adapter_name(name: str) -> str:
    """A parameter's name in the model, from its name in a PEFT-wrapped one."""
    return (
        name.removeprefix("base_model.model.")
        .replace(".lora_A.default.", ".lora_A.")
        .replace(".lora_B.default.", ".lora_B.")
    )


def clean_trainable_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of `non_lora_trainables.bin` without the wrappers of training."""
    tensors = {name.removeprefix("base_model."): tensor for name, tensor in tensors.items()}
    if any(name.startswith("model.model.") for name in tensors):
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return tensors


def merge_lora(model: nn.Module, folder: str) -> None:
    """Adds the LoRA update of an adapter folder to the weights: W + scale * B A."""
    path = os.path.join(folder, "adapter_config.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{folder} holds no adapter_config.json, so it is no LoRA checkpoint"
        )
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config["peft_type"]
        raise ValueError(f"{path}: adapters of type {kind} are not supported, only plain LoRA")
    tensors = {clean_adapter_name(k): t for k, t in read_tensors(folder, "adapter_model").items()}
    if not tensors:
        raise FileNotFoundError(f"{folder} holds neither adapter_model.safetensors nor .bin")
    parameters = dict(model.named_parameters())
    for name, down in tensors.items():
        if name.endswith(".lora_B.weight"):
            continue
        if not name.endswith(".lora_A.weight"):
            if name not in parameters:
                raise ValueError(f"{folder}: adapter weight {name!r} has no place in the model")
            parameters[name].data.copy_(tensors[name])
            continue
        module = name.removesuffix(".lora_A.weight")
        if f"{module}.lora_B.weight" not in tensors or f"{module}.weight" not in parameters:
            raise ValueError(f"{folder}: adapter weight {name!r} has no partner or no target")
        weight = parameters[f"{module}.weight"]
        update = (
            tensors[f"{module}.lora_B.weight"].float() @ down.float() * lora_scale(config, module)
        )
        update = update.T if config.get("fan_in_fan_out") else update
        weight.data += update.to(weight.device, weight.dtype)


def lora_scale(config: dict, module: str) -> float:
    """alpha / rank of one module, with the exceptions an adapter config may list."""

    def pattern(table: str, default):
        for key, value in (config.get(table) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        return default

    rank, alpha = (
        pattern("rank_pattern", config["r"]),
        pattern("alpha_pattern", config["lora_alpha"]),
    )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def write_checkpoint(
    folder: str, tensors: dict[str, Tensor], like: str | None = None, torch_dtype: str | None = None
) -> None:
    """Saves weights as safetensors, in files of at most `SHARD_BYTES`.

    like:        folder whose config and tokenizer files are copied along
    torch_dtype: what the copied config says about the weights
    """
    os.makedirs(folder, exist_ok=True)
    if like and os.path.abspath(like) != os.path.abspath(folder):
        _copy_settings(like, folder, torch_dtype)
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, os.path.join(folder, name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": weight_map,
    }
    with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
        json.dump(index, file, indent=2)


def _copy_settings(source: str, target: str, torch_dtype: str | None) -> None:
    """Config and tokenizer files; a relative tower path is rewritten for its new place."""
    for name in os.listdir(source):
        if name.endswith((".json", ".model", ".txt")) and not name.endswith(".index.json"):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
    path = os.path.join(target, "config.json")
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    tower = os.path.join(source, config.get("mm_vision_tower") or "")
    if config.get("mm_vision_tower") and os.path.isdir(tower):
        config["mm_vision_tower"] = os.path.relpath(tower, target)
    if torch_dtype:
        config["torch_dtype"] = torch_dtype
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
