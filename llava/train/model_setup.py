"""A model ready for training: loaded, its vision modules in place, the right parts frozen."""

from __future__ import annotations

import logging
import math
import os

import torch
import transformers
from torch import nn

from llava.checkpoint_kind import Kind, family_of, is_multimodal, kind_of
from llava.config_file import check_config, shown
from llava.conv_mode import announce, choose_conv_mode
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import FAMILIES
from llava.model.split_parameters import whole
from llava.pruning import build_pruner
from llava.pruning.cli import pruner_from_args
from llava.weight_files import weight_files

logger = logging.getLogger(__name__)

# Settings that a LLaVA checkpoint brings along; a flag that is given wins over it.
CHECKPOINT_SETTINGS = (
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_patch_merge_type",
    "mm_use_im_start_end",
    "mm_use_im_patch_token",
    "mm_projector_type",
)
DECODER = ("model.layers.", "model.norm.", "model.embed_tokens.", "lm_head.")
NOT_ADAPTED = ("mm_projector", "vision_tower", "vision_resampler", "lm_head")


def load_model(model_args, data_args, training_args, given: set[str], attn_implementation=None):
    """The model to train. A LLaVA checkpoint keeps its vision settings except for flags in `given`.

    Weights are float32 where they are trained without DeepSpeed (which keeps its own float32
    copies), the compute type otherwise.
    """
    path = model_args.model_name_or_path
    kind, values = checkpoint_kind(path, training_args.cache_dir)
    settle_version(model_args, values, given)
    options = {
        "cache_dir": training_args.cache_dir,
        "torch_dtype": weights_dtype(model_args, training_args),
        **quantization_options(training_args),
    }
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if model_args.vision_tower is None and not kind.multimodal:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    else:
        config_class, model_class = FAMILIES[kind.family]
        config = config_class.from_pretrained(path, cache_dir=training_args.cache_dir)
        if getattr(config, "mm_vision_tower", None):
            adopt_settings(config, model_args, data_args, given)
        model, info = model_class.from_pretrained(
            path, config=config, output_loading_info=True, **options
        )
        check_decoder(info, path)
        if any(key.endswith("image_newline") for key in info["missing_keys"]):
            newline = model.get_model().image_newline
            with whole([newline], change=True):
                newline.data.normal_(std=1 / math.sqrt(config.hidden_size))
    model.config.use_cache = False
    return model


def check_decoder(info: dict, path: str) -> None:
    """Raises ValueError where a checkpoint's decoder has other weights than its config says: what
    is lacking would start at random, and what is left over would be dropped."""
    for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "holds, without a place,")):
        if names := [name for name in info[key] if name.startswith(DECODER)]:
            raise ValueError(
                f"{path} {what} {len(names)} weights of the decoder that its config.json "
                f"describes, {names[0]} for one: it is a model of another kind or size"
            )


def checkpoint_kind(path: str, cache_dir: str | None = None) -> tuple[Kind, dict]:
    """(kind, config values) of the checkpoint to start from.

    Raises ValueError or FileNotFoundError, with what is supported, for anything that cannot be
    trained.
    """
    local = os.path.isdir(path)
    if local:
        kind, values = kind_of(path)
    else:
        values, _ = transformers.PretrainedConfig.get_config_dict(path, cache_dir=cache_dir)
        kind = Kind(family_of(values, path), is_multimodal(values))
    if kind.family not in FAMILIES:
        raise ValueError(
            f"{path} is a {shown(kind.family)} model; choose a Llama or Mistral model, or a LLaVA "
            "made of one"
        )
    if local:
        weight_files(path)  # all there, none outside of the folder
    return kind, check_config(values, f"{path}/config.json")


def settle_version(model_args, values: dict, given: set[str]) -> None:
    """Training on a LLaVA goes on in its own prompt template, unless `--version` is given."""
    if "version" in given or not is_multimodal(values):
        return
    name = get_model_name_from_path(model_args.model_name_or_path)
    choice = choose_conv_mode(values, name)
    announce(choice)
    model_args.version = choice.name


def adopt_settings(config, model_args, data_args, given: set[str]) -> None:
    """Unifies the flags with the config of a LLaVA checkpoint, in both directions."""
    for key in CHECKPOINT_SETTINGS:
        if key not in given:
            value = getattr(config, key, None)
            setattr(model_args, key, getattr(model_args, key) if value is None else value)
        elif (
            key == "mm_projector_type" and config.mm_projector_type != model_args.mm_projector_type
        ):
            raise ValueError(
                f"mm_projector_type {model_args.mm_projector_type!r} does not fit the checkpoint, "
                f"whose projector is {config.mm_projector_type!r}"
            )
        setattr(config, key, getattr(model_args, key))
    if "image_aspect_ratio" not in given:
        ratio = getattr(config, "image_aspect_ratio", None)
        data_args.image_aspect_ratio = ratio or data_args.image_aspect_ratio
    if model_args.vision_tower is None:
        model_args.vision_tower = config.mm_vision_tower
    config.mm_vision_tower = model_args.vision_tower


def weights_dtype(model_args, training_args) -> torch.dtype:
    """In which type the weights of the checkpoint are held."""
    trained = not (
        model_args.tune_mm_mlp_adapter
        or model_args.freeze_backbone
        or training_args.lora_enable
        or training_args.bits < 16
    )
    if trained and not training_args.deepspeed:
        return torch.float32
    return training_args.compute_dtype


def quantization_options(training_args) -> dict:
    """Keywords of `from_pretrained` for 4 and 8 bit base weights."""
    if training_args.bits == 16:
        return {}
    if training_args.bits not in (4, 8):
        raise ValueError(f"bits {training_args.bits} is not supported, choose 4, 8 or 16")
    return {
        "device_map": {"": training_args.device},
        "quantization_config": transformers.BitsAndBytesConfig(
            load_in_4bit=training_args.bits == 4,
            load_in_8bit=training_args.bits == 8,
            llm_int8_skip_modules=["mm_projector"],
            llm_int8_threshold=6.0,
            llm_int8_has_fp16_weight=False,
            bnb_4bit_compute_dtype=training_args.compute_dtype,
            bnb_4bit_use_double_quant=training_args.double_quant,
            bnb_4bit_quant_type=training_args.quant_type,
        ),
    }


def freeze_backbone(model: nn.Module, model_args, training_args) -> None:
    """What has to happen to the language model before adapters and vision modules are added."""
    if model_args.freeze_backbone:
        getattr(model, "model", model).requires_grad_(False)
    if training_args.bits < 16:
        from peft import prepare_model_for_kbit_training

        model.config.torch_dtype = training_args.compute_dtype
        prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=training_args.gradient_checkpointing
        )
    if training_args.gradient_checkpointing:
        model.enable_input_require_grads()


def find_all_linear_names(model: nn.Module) -> list[str]:
    """Leaf names of the linear layers that LoRA adapts: those of the decoder."""
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not any(part in name for part in NOT_ADAPTED)
        }
    )


def lora_targets(model: nn.Module) -> list[str] | str:
    """Which modules peft adapts: leaf names, or a pattern if they also occur in a loaded tower."""
    leaves = find_all_linear_names(model)
    others = [name for name, _ in model.named_modules() if "vision_tower." in name]
    if any(name.rsplit(".", 1)[-1] in leaves for name in others):
        return rf"(?!.*vision_tower).*\.({'|'.join(leaves)})"
    return leaves


def add_lora(model: nn.Module, training_args) -> nn.Module:
    """`model` with a fresh LoRA adapter on every linear layer of the decoder."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install -e .[train]") from error
    config = LoraConfig(
        r=training_args.lora_r,
        lora_alpha=training_args.lora_alpha,
        target_modules=lora_targets(model),
        lora_dropout=training_args.lora_dropout,
        bias=training_args.lora_bias,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def add_vision(llava: nn.Module, tokenizer, model_args, data_args, training_args) -> None:
    """Vision tower and projector: built or loaded, frozen as asked, and noted in the config."""
    inner = llava.get_model()
    inner.initialize_vision_modules(model_args, fsdp=training_args.fsdp or None)
    config, tower = llava.config, llava.get_vision_tower()
    tower.to(device=training_args.device, dtype=training_args.compute_dtype)
    for key, value in {
        "image_aspect_ratio": data_args.image_aspect_ratio,
        "tokenizer_padding_side": tokenizer.padding_side,
        "tokenizer_model_max_length": tokenizer.model_max_length,
        "tune_mm_mlp_adapter": model_args.tune_mm_mlp_adapter,
        "freeze_mm_mlp_adapter": training_args.freeze_mm_mlp_adapter,
        "mm_use_im_start_end": model_args.mm_use_im_start_end,
        "mm_projector_lr": training_args.mm_projector_lr,
        "mm_use_im_patch_token": model_args.mm_use_im_patch_token,
    }.items():
        setattr(config, key, value)
    if data_args.image_aspect_ratio == "anyres" and not getattr(
        config, "image_grid_pinpoints", None
    ):
        side = tower.image_size
        shapes = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
        config.image_grid_pinpoints = [[side * w, side * h] for w, h in shapes]
    if model_args.tune_mm_mlp_adapter:
        llava.requires_grad_(False)
        inner.mm_projector.requires_grad_(True)
    if training_args.freeze_mm_mlp_adapter:
        inner.mm_projector.requires_grad_(False)
    llava.initialize_vision_tokenizer(model_args, tokenizer)
    tower.requires_grad_(False)
    if model_args.unfreeze_mm_vision_tower:
        config.unfreeze_mm_vision_tower = True
        config.mm_vision_tower_lr = training_args.mm_vision_tower_lr
        tower.vision_tower.requires_grad_(True)
    data_args.image_processor = tower.image_processor
    data_args.tokens_per_image = tower.num_patches
    data_args.is_multimodal = True
    data_args.mm_use_im_start_end = model_args.mm_use_im_start_end


def add_pruner(llava: nn.Module, model_args, data_args, pruner=None) -> None:
    """Puts the pruning method of the flags, or the caller's, on the model."""
    chosen = model_args.pruning_method != "none" or model_args.pruning_arg
    if pruner is not None and chosen:
        raise ValueError(
            f"a pruner object was passed beside pruning_method {model_args.pruning_method!r}"
        )
    llava.pruner = pruner_from_args(model_args) if pruner is None else pruner
    if repr(llava.pruner) != repr(build_pruner("none")):
        logger.info("training with %r", llava.pruner)
        data_args.tokens_per_image = 1  # or more, which depends on the method
    # The dataset prepares images the way the method wants them.
    data_args.image_grid_pinpoints = llava.image_settings.image_grid_pinpoints
    data_args.anyres_selection = llava.image_settings.anyres_selection


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
