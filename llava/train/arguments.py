"""The flags of the training program: three dataclasses, one flag per field.

Names and defaults are those of the published recipes; what is added here is marked "added".
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, fields

import torch
import transformers

from llava.model.placement import cpu_multiplies_bfloat16

logger = logging.getLogger(__name__)

#: what launchers tell the processes they start: torchrun and deepspeed, and those of MPI
LAUNCHED = ("RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

LORA_BIASES = ("none", "all", "lora_only")


@dataclass
class ModelArguments:
    """What is trained: the checkpoint, its vision modules and (added) a pruning method."""

    model_name_or_path: str = "facebook/opt-125m"
    version: str = "v0"
    freeze_backbone: bool = False
    tune_mm_mlp_adapter: bool = False
    vision_tower: str | None = None
    mm_vision_select_layer: int = -1
    pretrain_mm_mlp_adapter: str | None = None
    mm_projector_type: str = "linear"
    mm_use_im_start_end: bool = False
    mm_use_im_patch_token: bool = True
    mm_patch_merge_type: str = "flat"
    mm_vision_select_feature: str = "patch"
    unfreeze_mm_vision_tower: bool = field(
        default=False, metadata={"help": "added: train the vision tower as well"}
    )
    pruning_method: str = field(
        default="none", metadata={"help": "added: prune visual tokens while training"}
    )
    visual_token_num: int | None = field(
        default=None, metadata={"help": "added: token budget per image of the pruning method"}
    )
    pruning_arg: list[str] = field(
        default_factory=list, metadata={"help": "added: KEY=VALUE options of the pruning method"}
    )


@dataclass
class DataArguments:
    """Where samples come from and how they become ids, labels and pixels."""

    data_path: str | None = None
    lazy_preprocess: bool = field(default=False, metadata={"help": "ignored: always lazy"})
    is_multimodal: bool = False
    image_folder: str | None = None
    image_aspect_ratio: str = "square"
    min_pixels: int | None = field(
        default=None,
        metadata={"help": "added: least area of an image (Qwen2.5-VL: 784 pixels are a token)"},
    )
    max_pixels: int | None = field(default=None, metadata={"help": "added: largest area"})
    skip_bad_samples: bool = field(
        default=False,
        metadata={"help": "added: leave out samples with mistakes instead of stopping"},
    )
    label_masks: str = field(
        default="exact",
        metadata={"help": "added: exact, or released (the published masks with their defects)"},
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """The Trainer's own arguments plus LoRA, quantisation and learning-rate groups."""

    cache_dir: str | None = None
    optim: str = "adamw_torch"
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "added: True, as in transformers, logs 0 for a loss that is NaN"},
    )
    remove_unused_columns: bool = False
    freeze_mm_mlp_adapter: bool = False
    mpt_attn_impl: str = field(default="triton", metadata={"help": "unused: MPT is not supported"})
    model_max_length: int = field(
        default=512, metadata={"help": "longer sequences are cut on the right (and padded to it)"}
    )
    double_quant: bool = True
    quant_type: str = "nf4"
    bits: int = field(default=16, metadata={"help": "4, 8 (bitsandbytes) or 16"})
    lora_enable: bool = False
    lora_r: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_weight_path: str = field(default="", metadata={"help": "unused"})
    lora_bias: str = field(default="none", metadata={"help": "none, all or lora_only"})
    mm_projector_lr: float | None = None
    group_by_modality_length: bool = False
    mm_vision_tower_lr: float | None = field(
        default=None, metadata={"help": "added: learning rate of an unfrozen vision tower"}
    )
    matrix_optim: str = field(
        default="same",
        metadata={"help": "added: muon = Muon for the matrices of the decoder layers"},
    )

    def __post_init__(self) -> None:
        if not any(name in os.environ for name in LAUNCHED):
            self.ddp_backend = None  # one process: accelerate would look for others
        super().__post_init__()
        slow = self.bf16 and self.device.type == "cpu" and not cpu_multiplies_bfloat16()
        if slow and self.process_index == 0:
            logger.warning(
                "--bf16 True: this CPU multiplies bfloat16 many times slower than float32, leave "
                "it out to train faster"
            )

    @property
    def device(self) -> torch.device:
        """That of this process. Of several processes on the CPU accelerate numbers it, and a
        checkpoint cannot be read onto a CPU with a number."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type in which matrices are multiplied: float16, bfloat16 or float32."""
        return torch.float16 if self.fp16 else torch.bfloat16 if self.bf16 else torch.float32


def filled(kind: type, flags, **others):
    """An object of the dataclass `kind`; what `others` do not say comes from flags of that name."""
    names = [field.name for field in fields(kind) if field.name not in others]
    return kind(**{name: getattr(flags, name) for name in names}, **others)
