"""What a training run writes: the projector alone, a LoRA adapter, or the whole model."""

from __future__ import annotations

import copy
import glob
import os
from collections.abc import Callable

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.modeling_utils import unwrap_model

from llava.model.checkpoint import any_generation_config
from llava.model.split_parameters import whole
from llava.weight_files import share_files

from .family import Family
from .llava_family import LlavaFamily

ADAPTER_PARTS = ("mm_projector", "vision_resampler", "image_newline")
PROJECTOR_FILE = "mm_projector.bin"
NON_LORA_FILE = "non_lora_trainables.bin"
PRUNER_FILE = "pruner.bin"


def gathered(parameter: Tensor) -> Tensor:
    """The whole parameter on the CPU; collected from all processes if DeepSpeed has split it."""
    with whole([parameter]):
        return parameter.detach().cpu().clone()


def select_state(model: nn.Module, wanted: Callable[[str, Tensor], bool]) -> dict[str, Tensor]:
    """Copies of the parameters for which `wanted(name, parameter)`; every process must call it."""
    return {name: gathered(p) for name, p in model.named_parameters() if wanted(name, p)}


def projector_state(model: nn.Module) -> dict[str, Tensor]:
    """The projector, the newline embedding it was trained beside, which a language model lacks, and
    the embeddings, where image markers are trained with it."""
    parts = ADAPTER_PARTS
    if getattr(model.config, "mm_use_im_start_end", False):
        parts += ("embed_tokens", "embed_in")
    return select_state(model, lambda name, _: any(part in name for part in parts))


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Adapter weights, and the biases that are trained with them."""
    bias = model.active_peft_config.bias
    layers = {name.split("lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}

    def wanted(name: str, p: Tensor) -> bool:
        if "lora_" in name or bias == "none":
            return "lora_" in name
        is_bias = p.requires_grad and name.endswith("bias")
        # peft nests an adapted layer's own bias: LAYER.base_layer.bias
        return is_bias and (bias == "all" or name.removesuffix("base_layer.bias") in layers)

    return select_state(model, wanted)


def non_lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters outside the adapter, and the projector also where it is kept fixed: the
    base may lack it, or have another one."""

    def wanted(name: str, p: Tensor) -> bool:
        kept = p.requires_grad or any(part in name for part in ADAPTER_PARTS)
        return kept and "lora_" not in name

    return select_state(model, wanted)


def save_projector(
    model: nn.Module, folder: str, state: dict[str, Tensor], beside: bool = False
) -> None:
    """Writes config.json and mm_projector.bin.

    beside: a folder named `checkpoint-N` gets its weights as `../mm_projector/checkpoint-N.bin`.
    """
    portable_config(model, folder).save_pretrained(folder)
    parent, name = os.path.split(os.path.normpath(folder))
    path = os.path.join(folder, PROJECTOR_FILE)
    if beside and name.startswith("checkpoint-"):
        path = os.path.join(parent, "mm_projector", f"{name}.bin")
        os.makedirs(os.path.dirname(path), exist_ok=True)
    torch.save(state, path)


def save_lora(model: nn.Module, folder: str, adapter: dict, others: dict) -> None:
    """Writes the adapter, config.json and non_lora_trainables.bin; `model` is a PeftModel."""
    model.save_pretrained(folder, state_dict=adapter, save_embedding_layers=False)
    share_files(folder)
    portable_config(model, folder).save_pretrained(folder)
    torch.save(others, os.path.join(folder, NON_LORA_FILE))


def is_written(model: nn.Module, name: str, family: Family) -> bool:
    """Whether the weight `name` is in the files of a whole model: a head that is the table of
    embeddings is there once."""
    tied = getattr(model.config, "tie_word_embeddings", False) and model._tied_weights_keys
    return family.is_saved(model, name) and name not in (tied or ())


def save_full(
    model: nn.Module,
    folder: str,
    state: dict[str, Tensor],
    dtype: torch.dtype | None = None,
    family: Family | None = None,
) -> None:
    """Writes config.json and safetensors of the whole model, in `dtype` if given.

    What the family does not save (a tower that the config names) and a pruning method's own weights
    are left out. Raises ValueError when a parameter of the model is missing in what was written.
    """
    family = family or LlavaFamily()

    def wanted(name: str) -> bool:
        return is_written(model, name, family)

    state = {
        name: value.to(dtype) if dtype is not None and value.is_floating_point() else value
        for name, value in state.items()
        if wanted(name)
    }
    with any_generation_config(unwrap_model(model), folder):
        model.save_pretrained(folder, state_dict=state)
    share_files(folder)
    check_written(model, folder, wanted)
    config = portable_config(model, folder)
    if dtype is not None:
        config.torch_dtype = dtype
    config.save_pretrained(folder)


def check_written(model: nn.Module, folder: str, wanted: Callable[[str], bool]) -> None:
    """Raises ValueError unless the safetensors in `folder` hold the wanted parameters, whole."""
    empty, written = set(), set()
    for path in glob.glob(os.path.join(folder, "model*.safetensors")):
        with safe_open(path, "pt") as file:
            written |= set(file.keys())
            empty |= {name for name in file.keys() if 0 in file.get_slice(name).get_shape()}
    # FSDP names the modules it wraps in the names of their parameters.
    names = {name.replace("_fsdp_wrapped_module.", "") for name, _ in model.named_parameters()}
    lacking = sorted({name for name in names if wanted(name)} - (written - empty))
    if lacking:
        raise ValueError(
            f"{folder} lacks {len(lacking)} of the model's {len(names)} parameters, "
            f"{lacking[0]} for one: the weights were not collected from all processes"
        )


def portable_config(model: nn.Module, folder: str):
    """A copy of the model's config as it belongs into `folder`.

    A vision tower given by a relative path is named relative to `folder`.
    """
    config = copy.deepcopy(model.config)
    llava = unwrapped(model)
    tower = llava.get_vision_tower() if hasattr(llava, "get_vision_tower") else None
    name = getattr(config, "mm_vision_tower", None)
    if tower is not None and name and not os.path.isabs(name):
        if os.path.isdir(tower.vision_tower_name):
            config.mm_vision_tower = os.path.relpath(tower.vision_tower_name, folder)
    if os.path.isdir(config._name_or_path):  # no trace of the machine it was trained on
        config._name_or_path = os.path.basename(os.path.normpath(config._name_or_path))
    config.use_cache = True
    return config


def unwrapped(model: nn.Module) -> nn.Module:
    """The LLaVA inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
