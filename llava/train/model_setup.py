"""A model ready for training: its family chosen, adapters and a pruning method in place, the right
parts frozen, everything in its type."""

from __future__ import annotations

import logging
import os

import torch
import transformers
from torch import nn

from llava.checkpoint_kind import OTHER_FAMILIES, Kind, is_multimodal, kind_of
from llava.checkpoint_kind import family_of as language_model_of
from llava.config_file import check_config, read_config, shown
from llava.conv_mode import announce, choose_conv_mode
from llava.errors import how_to_install
from llava.llava_hf import is_llava_hf
from llava.mm_utils import get_model_name_from_path
from llava.pruning import build_pruner
from llava.pruning.cli import pruner_from_args
from llava.weight_files import weight_files

from .family import Family
from .llava_family import LlavaFamily
from .qwen2_5_vl_family import Qwen2_5_VLFamily

logger = logging.getLogger(__name__)

#: kind of language model, or of model, that a config names -> what trains it
FAMILIES: dict[str, type[Family]] = {
    "llama": LlavaFamily,
    "mistral": LlavaFamily,
    "qwen2_5_vl": Qwen2_5_VLFamily,
}
#: modules of language models that LoRA leaves alone, besides those that see
NOT_ADAPTED = ("vision_resampler", "lm_head")


def choose_family(model_args, training_args, given: set[str]) -> Family:
    """What trains the checkpoint that the flags name; `--version` becomes its own template unless
    that flag is among those `given`. Raises ValueError for a template that it does not know."""
    family = family_of(model_args.model_name_or_path, training_args.cache_dir)
    settle_version(model_args, family.values, given)
    family.template_name(model_args.version)
    return family


def family_of(path: str, cache_dir: str | None = None) -> Family:
    """What trains the checkpoint at `path`; errors as of `checkpoint_kind`."""
    kind, values = checkpoint_kind(path, cache_dir)
    return FAMILIES[kind.family](path, kind, values)


def checkpoint_kind(path: str, cache_dir: str | None = None) -> tuple[Kind, dict]:
    """(kind, config values) of the checkpoint to start from.

    Raises ValueError or FileNotFoundError, with what is supported, for anything that cannot be
    trained.
    """
    local = os.path.isdir(path)
    if local:
        values = read_config(path, required=False)
    else:
        values, _ = transformers.PretrainedConfig.get_config_dict(path, cache_dir=cache_dir)
    if is_llava_hf(values):
        raise ValueError(
            f"{path} is in the layout of transformers (llava-hf), which answers but cannot be "
            "trained here as it is: convert it with python -m llava.model.export --from llava-hf"
        )
    if local:
        kind, values = kind_of(path)
    else:
        kind = Kind(language_model_of(values, path), is_multimodal(values))
    if kind.family not in FAMILIES:
        raise ValueError(
            f"{path} is a {shown(kind.family)} model; choose a Llama or Mistral model, a LLaVA "
            "made of one, or Qwen2.5-VL"
        )
    if local:
        weight_files(path)  # all there, none outside of the folder
    if kind.family not in OTHER_FAMILIES:  # those have values of their own
        values = check_config(values, f"{path}/config.json")
    return kind, values


def settle_version(model_args, values: dict, given: set[str]) -> None:
    """Training on a LLaVA goes on in its own prompt template, unless `--version` is given."""
    if "version" in given or not is_multimodal(values):
        return
    name = get_model_name_from_path(model_args.model_name_or_path)
    choice = choose_conv_mode(values, name)
    announce(choice)
    model_args.version = choice.name


def ready_backbone(family: Family, model: nn.Module, model_args, training_args) -> None:
    """What has to happen to the language model before adapters and vision modules are added."""
    if model_args.freeze_backbone:
        family.freeze_backbone(model)
    if training_args.bits < 16:
        from peft import prepare_model_for_kbit_training

        model.config.torch_dtype = training_args.compute_dtype
        prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=training_args.gradient_checkpointing
        )
    if training_args.gradient_checkpointing:
        model.enable_input_require_grads()


def find_all_linear_names(model: nn.Module, family: Family | None = None) -> list[str]:
    """Leaf names of the linear layers that LoRA adapts: those of the decoder."""
    family = family or LlavaFamily()
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and not family.part_of(f"{name}.")
            and not any(part in name for part in NOT_ADAPTED)
        }
    )


def lora_targets(model: nn.Module, family: Family) -> list[str] | str:
    """Which modules peft adapts: leaf names, or a pattern if they also occur in a loaded tower."""
    leaves = find_all_linear_names(model, family)
    others = [name for name, _ in model.named_modules() if family.part_of(f"{name}.")]
    if any(name.rsplit(".", 1)[-1] in leaves for name in others):
        return rf"(?!.*{family.tower.rstrip('.')}).*\.({'|'.join(leaves)})"
    return leaves


def add_lora(family: Family, model: nn.Module, training_args) -> nn.Module:
    """`model` with a fresh LoRA adapter on every linear layer of the decoder."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(f"LoRA needs peft: {how_to_install('train')}") from error
    config = LoraConfig(
        r=training_args.lora_r,
        lora_alpha=training_args.lora_alpha,
        target_modules=lora_targets(model, family),
        lora_dropout=training_args.lora_dropout,
        bias=training_args.lora_bias,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def sees(model: nn.Module) -> bool:
    """Whether a model has a vision tower."""
    return hasattr(model, "get_vision_tower") and model.get_vision_tower() is not None


def chosen_pruner(model_args, pruner=None):
    """The pruning method of the flags, or the caller's. Raises ValueError for both."""
    chosen = model_args.pruning_method != "none" or model_args.pruning_arg
    if pruner is not None and chosen:
        raise ValueError(
            f"a pruner object was passed beside pruning_method {model_args.pruning_method!r}"
        )
    return pruner_from_args(model_args) if pruner is None else pruner


def add_pruner(llava: nn.Module, pruner, data_args) -> None:
    """Puts a pruning method on the model."""
    llava.pruner = pruner
    if repr(llava.pruner) != repr(build_pruner("none")):
        logger.info("training with %r", llava.pruner)
        data_args.tokens_per_image = 1  # or more, which depends on the method
    # The dataset prepares images the way the method wants them.
    data_args.image_grid_pinpoints = llava.image_settings.image_grid_pinpoints
    data_args.anyres_selection = llava.image_settings.anyres_selection


def check_trained(model: nn.Module) -> None:
    """Raises ValueError when the flags leave nothing to train."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "nothing is left to train: of --freeze_backbone, --freeze_mm_mlp_adapter and "
            "--tune_mm_mlp_adapter, leave one out, or add --lora_enable True or "
            "--unfreeze_mm_vision_tower True"
        )


def settle_dtypes(model: nn.Module, training_args) -> None:
    """Trained parameters in float32 (DeepSpeed: in the compute type), the rest as loaded.

    With quantised weights: norms in float32, LoRA layers and the vocabulary in bfloat16.
    """
    dtype = torch.float32 if not training_args.deepspeed else training_args.compute_dtype
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    if training_args.bits == 16:
        return
    for name, module in model.named_modules():
        if "lora_" in name and training_args.bf16:
            module.to(torch.bfloat16)
        if "norm" in name:
            module.to(torch.float32)
        if ("lm_head" in name or "embed_tokens" in name) and hasattr(module, "weight"):
            if training_args.bf16 and module.weight.dtype == torch.float32:
                module.to(torch.bfloat16)
