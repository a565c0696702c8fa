"""What training does differently for one family of models and another, as one object.

The program (`train.py`), the Trainer and the savers talk to a `Family` and know no names of models;
`model_setup.choose_family` picks it by the checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
import transformers
from torch import nn

from llava.checkpoint_kind import Kind
from llava.conversation import Conversation

LORA, PROJECTOR, FULL = "lora", "projector", "full"


@dataclass
class Family(ABC):
    """A family of models, for one run.

    folder: the checkpoint to start from: a folder, or a repository of the hub
    kind:   what it is
    values: its config.json
    """

    folder: str = ""
    kind: Kind | None = None
    values: dict = field(default_factory=dict)

    #: what the names of a part's parameters hold; the projector may lie inside of the tower
    projector = "mm_projector"
    tower = "vision_tower"
    #: modules that stay in 16 bits where the others are quantised
    not_quantized = ("mm_projector",)

    @abstractmethod
    def load_model(self, model_args, data_args, training_args, given: set[str], attention=None):
        """The model to train, in the types that `weights_dtype` names; given: flags that were set.

        Raises ValueError for flags and weights that do not fit.
        """

    @abstractmethod
    def load_tokenizer(self, training_args) -> transformers.PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, padding on the right."""

    @abstractmethod
    def template_name(self, version: str) -> str:
        """The prompt template that `--version` names. Raises ValueError on an unknown one."""

    @abstractmethod
    def choose_template(self, tokenizer, model: nn.Module, version: str) -> Conversation:
        """The prompt template of `--version`, which goes into the model's config; the tokenizer
        gets its padding token."""

    @abstractmethod
    def freeze_backbone(self, model: nn.Module) -> None:
        """What `--freeze_backbone` keeps as it is."""

    @abstractmethod
    def add_vision(self, model, tokenizer, model_args, data_args, training_args) -> None:
        """Readies the parts that see: built, frozen as asked, noted in the config; says in
        `data_args` how images are prepared."""

    def part_of(self, name: str) -> str:
        """The part that the parameter `name` belongs to: "projector", "tower", or "" (language
        model)."""
        if self.projector in name:
            return "projector"
        return "tower" if self.tower in name else ""

    def saved_part(self, model: nn.Module) -> str:
        """What checkpoints hold: "lora", "projector" (alone) or "full"."""
        return LORA if hasattr(model, "peft_config") else FULL

    def is_saved(self, model: nn.Module, name: str) -> bool:
        """Whether a whole model is saved with its weight `name`."""
        return not name.startswith("pruner_module.")

    def merged_dtype(self) -> torch.dtype:
        """In which type a checkpoint is written that an adapter was merged into."""
        return torch.float16  # as published

    @abstractmethod
    def save_beside(self, folder: str, part: str, tokenizer) -> None:
        """Writes what belongs into a folder beside the weights of this part."""


def weights_dtype(model_args, training_args) -> torch.dtype:
    """In which type the weights of the checkpoint are held: float32 where they are trained without
    DeepSpeed (which keeps float32 copies itself), the compute type otherwise."""
    trained = not (
        model_args.tune_mm_mlp_adapter
        or model_args.freeze_backbone
        or training_args.lora_enable
        or training_args.bits < 16
    )
    if trained and not training_args.deepspeed:
        return torch.float32
    return training_args.compute_dtype


def set_attention(config, attention: str | None) -> None:
    """Makes a model of this config attend that way; None leaves it to transformers, which takes a
    keyword of `from_pretrained` for its default where it says "eager"."""
    if attention is not None:
        config._attn_implementation = attention


def loading_options(family: Family, model_args, training_args, attention: str | None) -> dict:
    """Keywords of `from_pretrained`; 4 and 8 bit base weights included."""
    options = {"torch_dtype": weights_dtype(model_args, training_args)}
    if attention is not None:
        options["attn_implementation"] = attention
    if training_args.bits == 16:
        return options
    if training_args.bits not in (4, 8):
        raise ValueError(f"bits {training_args.bits} is not supported, choose 4, 8 or 16")
    return options | {
        "device_map": {"": training_args.device},
        "quantization_config": transformers.BitsAndBytesConfig(
            load_in_4bit=training_args.bits == 4,
            load_in_8bit=training_args.bits == 8,
            llm_int8_skip_modules=list(family.not_quantized),
            llm_int8_threshold=6.0,
            llm_int8_has_fp16_weight=False,
            bnb_4bit_compute_dtype=training_args.compute_dtype,
            bnb_4bit_use_double_quant=training_args.double_quant,
            bnb_4bit_quant_type=training_args.quant_type,
        ),
    }


def check_loaded(info: dict, path: str, parts: tuple[str, ...]) -> None:
    """Raises ValueError where a checkpoint has other weights in `parts` (beginnings of names) than
    its config says: what is lacking would start at random, what is left over would be dropped."""
    for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "holds, without a place,")):
        if names := [name for name in info[key] if name.startswith(parts)]:
            raise ValueError(
                f"{path} {what} {len(names)} weights of the model that its config.json describes, "
                f"{names[0]} for one: it is a model of another kind or size"
            )
