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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_utils import no_init_weights

from ..checkpoint_kind import ADAPTER, ADAPTER_CONFIG
from ..config_file import one_sentence, read_json, shown
from ..progress import progress
from ..weight_files import (
    NO_PACKED,
    PACKED_SUFFIXES,
    WEIGHT_FILES,
    check_numbers,
    names_in,
    share_files,
    tensor_file,
    tensors_in,
    weight_files,
)

#: recomputed by the model, saved by some versions of other libraries
IGNORED_SUFFIXES = (
    "rotary_emb.inv_freq",
    "embeddings.position_ids",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
)
#: what may name modules in an adapter config: parts of names, and once "anything"
MODULE_PATTERN = re.compile(r"([\w.|^$()-]|\\[.d]|\.\*(?!.*\*))*")
TOWER_PREFIX = "model.vision_tower."
#: beginnings of the names of weights that only the decoder layers and the head have
DECODER_WEIGHTS = ("model.layers.", "model.norm.", "lm_head.")
#: names of weights that an error gives
SHOWN = 5
#: bytes per file of the checkpoints we write
SHARD_BYTES = 5 * 10**9


def read_tensors(folder: str, name: str) -> dict[str, Tensor]:
    """All tensors of `<name>.safetensors` or `<name>.bin` in `folder`; {} when neither exists."""
    path = tensor_file(folder, name)
    return read_file(path) if path else {}


def read_file(path: str) -> dict[str, Tensor]:
    """All tensors of a file. Raises ValueError where they are no finite floating-point numbers."""
    tensors = {}
    for key, tensor in tensors_in(path):
        check_numbers(key, tensor, path)
        if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise ValueError(f"{path}: {key} is not finite (NaN or infinity)")
        tensors[key] = tensor.clone()
    return tensors


def is_ignored(name: str) -> bool:
    return name.endswith(IGNORED_SUFFIXES)


def model_config(config_class, model_class, folder: str, values: dict, backend: str = "sdpa"):
    """The config of a model of `model_class` in `folder`, from checked values of its file."""
    # No value may take the place of what the class itself has (`model_type`, methods).
    foreign = {key for key in values if key.startswith("_") or hasattr(config_class, key)}
    values = {key: value for key, value in values.items() if key not in foreign}
    values["architectures"] = [model_class.__name__]
    with one_sentence(f"{folder}/config.json describes no model"):
        # As a keyword: transformers overwrites what the values say of it.
        config = config_class.from_dict(values, attn_implementation=backend)
    config._name_or_path = os.path.abspath(folder)
    return config


def build_empty(
    model_class, config, dtype: torch.dtype, device, decoder: bool = True, **how
) -> tuple[Any, Filler]:
    """A model without memory for its weights, and what fills it.

    decoder: False leaves out its decoder layers and head, which are in a server
    how:     further arguments of `Filler`
    """
    with one_sentence(config._name_or_path):
        with init_empty_weights(), no_init_weights():
            model = model_class(config)
    model.config.torch_dtype = dtype
    if not decoder:
        model.model.layers, model.model.norm, model.lm_head = nn.ModuleList(), None, None
        how["elsewhere"] = DECODER_WEIGHTS
    return model, Filler(model, dtype, device, **how)


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

    dtype, device:   of the floating-point weights in the finished model
    use_safetensors: kind of files that `add_folder` reads, as in `weight_files`
    rename:          a weight's name in the model, from its name in a file
    tower_dtype:     of the weights of a LLaVA's vision tower; None: as of all others
    elsewhere:       beginnings of the names of weights that are somewhere else
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        use_safetensors: bool | None = None,
        rename: Callable[[str], str] = str,
        tower_dtype: torch.dtype | None = None,
        elsewhere: tuple[str, ...] = (),
    ):
        self.model, self.dtype, self.device = model, dtype, device
        self.use_safetensors, self.rename = use_safetensors, rename
        self.tower_dtype, self.elsewhere = tower_dtype, elsewhere
        self.wanted = dict(model.state_dict(keep_vars=True))
        self.filled: set[str] = set()
        self.unexpected: list[str] = []
        self.ends: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor, source: str, fit: bool = False) -> None:
        """One weight; ignored when an earlier source gave it, an error when its shape is wrong.

        fit: a vocabulary of another size is cut or extended instead
        """
        name = self.rename(name)
        if name in self.filled or is_ignored(name) or name.startswith(self.elsewhere):
            return
        if name not in self.wanted:
            replaced = fit and "mm_projector" in name  # that of a base, deeper than the new one
            if not name.startswith(TOWER_PREFIX) and not replaced:
                self.unexpected.append(name)
            return
        check_numbers(name, tensor, source)
        shape = self.wanted[name].shape
        if tensor.shape != shape and fit and is_vocabulary(name):
            tensor = fit_rows(tensor, shape[0])
        if tensor.shape != shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, "
                f"the config asks for {tuple(shape)}"
            )
        own = self.tower_dtype if name.startswith(TOWER_PREFIX) else None
        placed = tensor.to(self.device, own or self.dtype, copy=True)
        self.ends[name] = torch.stack(torch.aminmax(placed))  # looked at once, in `finish`
        set_tensor(self.model, name, placed)
        self.filled.add(name)

    def add_folder(self, folder: str, fit: bool = False) -> None:
        """Every weight of a checkpoint folder."""
        for path in weight_files(folder, self.use_safetensors):
            for name, tensor in tensors_in(path, self.filled | self._elsewhere_in(path)):
                self.add(name, tensor, path, fit)

    def _elsewhere_in(self, path: str) -> set[str]:
        """Names in a file of weights that need not even be read."""
        if not self.elsewhere or not path.endswith(".safetensors"):
            return set()
        return {name for name in names_in(path) if self.rename(name).startswith(self.elsewhere)}

    def missing(self) -> list[str]:
        """Weights nobody gave."""
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
        if not getattr(self.model.config, "tie_word_embeddings", False):
            tied = set()
        return [name for name in self.wanted if name not in self.filled | tied]

    def finish(self, source: str) -> None:
        """Raises ValueError on missing weights, on more of them in parts the model has (it is
        another model then), and on numbers that are not finite. Warns about other weights that
        nobody asked for."""
        if missing := [name for name in self.missing() if not name.startswith(TOWER_PREFIX)]:
            packed = [name for name in self.unexpected if name.endswith(PACKED_SUFFIXES)]
            held = f" and holds {_some(packed)}: {NO_PACKED}" if packed else ""
            raise ValueError(f"{source} lacks {len(missing)} weights: {_some(missing)}{held}")
        finite = torch.stack([*self.ends.values()]).isfinite().all(dim=1).tolist()
        if odd := [name for name, fine in zip(self.ends, finite, strict=True) if not fine]:
            kind = str(self.dtype).removeprefix("torch.")
            raise ValueError(f"{source}: {_some(odd)} is not finite in {kind} (NaN or infinity)")
        parts = tuple({part_of(name) for name in self.wanted})
        known = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        foreign = [name for name in self.unexpected if name.startswith(parts)]
        if foreign := [n for n in foreign if not any(re.search(k, n) for k in known)]:
            raise ValueError(
                f"{source} holds {len(foreign)} weights that a model of its config.json does not "
                f"have, so it is a model of another kind or size: {_some(foreign)}"
            )
        if self.unexpected:
            warnings.warn(
                f"{source} holds {len(self.unexpected)} weights the model has no place for, they "
                f"are not used: {_some(self.unexpected)}",
                stacklevel=2,
            )
        if getattr(self.model.config, "tie_word_embeddings", False) and not self.elsewhere:
            self.model.tie_weights()


def part_of(name: str) -> str:
    """The part of a model that a weight belongs to: "model.layers.", "lm_head." and so on."""
    return ".".join(name.split(".")[: 2 if name.startswith("model.") else 1]) + "."


def is_vocabulary(name: str) -> bool:
    """Whether the weight has one row per token of the vocabulary."""
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


def fit_rows(tensor: Tensor, count: int) -> Tensor:
    """The first `count` rows; rows that are lacking become the mean, as training starts them."""
    mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor[:count], mean.expand(max(count - tensor.shape[0], 0), -1)])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def clean_adapter_name(name: str) -> str:
    """A parameter's name in the model, from its name in a PEFT-wrapped one."""
    return (
        name.removeprefix("base_model.model.")
        .replace(".base_layer.", ".")  # around an adapted layer's own bias
        .replace(".lora_A.default.", ".lora_A.")
        .replace(".lora_B.default.", ".lora_B.")
    )


def clean_trainable_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of `non_lora_trainables.bin` without the wrappers of training."""
    tensors = {
        name.removeprefix("base_model.").replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
    }
    if any(name.startswith("model.model.") for name in tensors):
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return tensors


def merge_lora(
    model: Any,
    folder: str,
    rename: Callable[[str], str] = str,
    elsewhere: tuple[str, ...] = (),
) -> None:
    """Adds the LoRA update of an adapter folder to the weights: W + scale * B A.

    rename, elsewhere: as of `Filler`
    """
    config = read_adapter_config(folder)
    tensors = {rename(clean_adapter_name(k)): t for k, t in read_tensors(folder, ADAPTER).items()}
    if not tensors:
        raise FileNotFoundError(f"{folder} holds neither adapter_model.safetensors nor .bin")
    parameters = dict(model.named_parameters())
    for name, down in tensors.items():
        if name.endswith(".lora_B.weight") or name.startswith(elsewhere):
            continue
        if not name.endswith(".lora_A.weight"):
            if name not in parameters:
                raise ValueError(f"{folder}: adapter weight {name!r} has no place in the model")
            if (own := tensors[name].shape) != (there := parameters[name].shape):
                raise ValueError(
                    f"{folder}: adapter weight {name!r} has shape {tuple(own)}, the model's "
                    f"{tuple(there)}"
                )
            parameters[name].data.copy_(tensors[name])
            continue
        module = name.removesuffix(".lora_A.weight")
        if f"{module}.lora_B.weight" not in tensors or f"{module}.weight" not in parameters:
            raise ValueError(f"{folder}: adapter weight {name!r} has no partner or no target")
        weight, up = parameters[f"{module}.weight"], tensors[f"{module}.lora_B.weight"]
        turned = bool(config.get("fan_in_fan_out"))
        ends = [*up.shape[:1], *down.shape[1:]]
        if up.shape[1:] != down.shape[:1] or ends[:: -1 if turned else 1] != [*weight.shape]:
            raise ValueError(
                f"{folder}: adapter weights of {module}, {tuple(up.shape)} and "
                f"{tuple(down.shape)}, do not fit its shape {tuple(weight.shape)}"
            )
        update = up.float() @ down.float() * lora_scale(config, module)
        update = update.T if turned else update
        weight.data += update.to(weight.device, weight.dtype)
    # What was trained for the base, such as the part of a pruning method, is not for this model.
    model.config._name_or_path = os.path.abspath(folder)


def read_adapter_config(folder: str) -> dict:
    """The values of adapter_config.json. Raises ValueError for anything but a plain LoRA."""
    path = os.path.join(folder, ADAPTER_CONFIG)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{folder} holds no adapter_config.json, so it is no LoRA checkpoint"
        )
    config = read_json(path)
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else shown(config["peft_type"])
        raise ValueError(f"{path}: adapters of type {kind} are not supported, only plain LoRA")
    tables = {}
    for table in ("rank_pattern", "alpha_pattern"):
        tables[table] = config.get(table) or {}
        if not isinstance(tables[table], dict):
            raise ValueError(f"{path}: {table} must be an object, not {shown(tables[table])}")
        for key in tables[table]:
            # Part of a regular expression, which a strange file could make run for ever.
            if len(key) > 200 or not MODULE_PATTERN.fullmatch(key) or not _compiles(key):
                raise ValueError(f"{path}: {table} has {shown(key)}, expected names of modules")
    ranks = [config.get("r"), *tables["rank_pattern"].values()]
    scales = [config.get("lora_alpha"), *tables["alpha_pattern"].values()]
    for value in ranks + scales:
        if type(value) not in (int, float) or not 0 < value < 1e6:
            raise ValueError(
                f"{path}: ranks (r) and scales (lora_alpha) must be positive numbers, not "
                f"{shown(value)}"
            )
    return config


def _compiles(pattern: str) -> bool:
    try:
        return bool(re.compile(pattern))
    except re.error:
        return False


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
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    index, single = (os.path.join(folder, name) for name in WEIGHT_FILES[0])
    if len(shards) == 1:
        save_file(shards[0], single, metadata={"format": "pt"})
        share_files(folder)
        _forget(index)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(progress(shards, "writing", "files"), start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, os.path.join(folder, name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    share_files(folder)
    listed = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": weight_map,
    }
    with open(index, "w", encoding="utf-8") as file:
        json.dump(listed, file, indent=2)
    _forget(single)


def _forget(path: str) -> None:
    """Removes a file of a checkpoint that was in the folder before: it would be read in place of
    the new ones, an index here, a single file by transformers."""
    with suppress(FileNotFoundError):
        os.remove(path)


def write_generation_config(folder: str, config: GenerationConfig) -> None:
    """generation_config.json, also of values that transformers loads but does not save, such as a
    temperature without sampling, which released models have."""
    with open(os.path.join(folder, "generation_config.json"), "w", encoding="utf-8") as file:
        file.write(config.to_json_string())


@contextmanager
def any_generation_config(model: Any, folder: str | None) -> Iterator[None]:
    """A block in which transformers saves `model` whatever its defaults of `generate` are, which
    are in `folder` behind it (None: nowhere). By itself it refuses those of Vicuna and LLaVA-1.5,
    a temperature without sampling, and writes no weights then."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
    if folder is not None:
        write_generation_config(folder, own)


def _copy_settings(source: str, target: str, torch_dtype: str | None) -> None:
    """Config and tokenizer files; a relative tower path is rewritten for its new place."""
    for name in os.listdir(source):
        if name.endswith((".json", ".model", ".txt")) and not name.endswith(".index.json"):
            shutil.copyfile(os.path.join(source, name), os.path.join(target, name))
    path = os.path.join(target, "config.json")
    if not os.path.isfile(path):
        return
    config = read_json(path)
    tower = os.path.join(source, config.get("mm_vision_tower") or "")
    if config.get("mm_vision_tower") and os.path.isdir(tower):
        config["mm_vision_tower"] = os.path.relpath(tower, target)
    if torch_dtype:
        config["torch_dtype"] = torch_dtype
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
