"""The flags of GlimpsePrune's training, with the paper's values, and recipes in yaml files.

Names are those of the published recipes, which are accepted as they are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..arguments import TrainingArguments, filled
from .data import read_yaml
from .loss import LossWeights

LAYOUTS = ("ours", "released")
#: fields of `GlimpseArguments` that make the shape of the trained part
SHAPE = (
    "selected_layers reduce_layer le_layers le_length le_norm_type le_dropout_prob "
    "selected_visual_layers use_attention_logits attn_fuse_type attn_fuse_size visual_cond_size "
    "attn_fuse_num_heads attn_fuse_global deep_supervision"
).split()
#: and those that say how the result prunes unless its user says otherwise; not given, they are what
#: `load_new_modules` says, else the paper's
PRUNING = "reduce_threshold min_remain_num max_remain_ratio anchor_positions".split()
#: lists of a recipe that may be empty, and the flags that say so: no layers are no glimpse
EMPTY = {"anchor_positions": [], "le_layers": ["--le_length", "0"]}


def shown(text: str) -> dict:
    """The help of a flag."""
    return {"metadata": {"help": text}}


@dataclass
class GlimpseArguments:
    """The model, and the shape of what is trained; None: the paper's, for the family and the depth
    of the model."""

    model_name_or_path: str = "liuhaotian/llava-v1.5-7b"
    adapter_dir: str | None = field(
        default=None, **shown("LoRA adapter that is merged into the model first")
    )
    attn_implementation: str = "sdpa"
    torch_dtype: str | None = field(
        default=None,
        **shown("float32, bfloat16 or float16, of the frozen model; default: what is computed in"),
    )
    load_new_modules: str | None = field(
        default=None, **shown("folder of a trained part to start from")
    )
    selected_layers: list[int] | None = field(
        default=None, **shown("decoder layers whose attention row is read")
    )
    reduce_layer: int | None = field(
        default=None, **shown("last decoder layer that sees all visual tokens")
    )
    le_layers: list[int] | None = field(
        default=None, **shown("layers before which a vector joins the glimpse; with 0")
    )
    le_length: int = 1
    le_norm_type: str = field(default="rmsnorm", **shown("rmsnorm or layernorm"))
    le_dropout_prob: float = 0.1
    selected_visual_layers: list[int] | None = field(
        default=None, **shown("layers of the tower that the predictor sees, deepest first")
    )
    use_attention_logits: bool | None = field(
        default=None, **shown("read scaled products in place of logarithms of attention weights")
    )
    attn_fuse_type: str = "AttnFuserV1"
    attn_fuse_size: int = 256
    visual_cond_size: int = 512
    attn_fuse_num_heads: int = 4
    attn_fuse_hidden_act: str = field(default="silu", **shown("only silu"))
    attn_fuse_global: bool = field(
        default=True, **shown("the predictor sees whole images; False: windows of the tower")
    )
    deep_supervision: bool = False
    ori_attn_supervision: bool = field(
        default=False, **shown("accepted: changes nothing in training, as published")
    )
    reduce_threshold: float | None = field(
        default=None, **shown("default: what load_new_modules says, else 0.5")
    )
    min_remain_num: int | None = field(default=None, **shown("default: likewise, else 1"))
    max_remain_ratio: float | None = field(default=None, **shown("default: likewise, else no cap"))
    anchor_positions: list[str] = field(
        default_factory=list, **shown("default: likewise, else none")
    )
    use_ref_masks: bool = field(default=False, **shown("accepted: False, training prunes nothing"))
    use_zero_masks: bool = field(default=False, **shown("accepted: False, likewise"))

    def __post_init__(self):
        if self.attn_fuse_hidden_act != "silu":
            raise ValueError(
                f"attn_fuse_hidden_act {self.attn_fuse_hidden_act!r} is unknown, choose silu"
            )
        if self.use_ref_masks or self.use_zero_masks:
            raise ValueError("use_ref_masks and use_zero_masks must be False: training keeps all")

    @property
    def shape(self) -> dict:
        """The values of `SHAPE` that were given, or are the paper's for every model."""
        return given_values(self, SHAPE)

    @property
    def pruning(self) -> dict:
        """The values of `PRUNING` that were given."""
        return {name: value for name, value in given_values(self, PRUNING).items() if value != ()}


@dataclass
class BoxArguments:
    """Where questions and boxes come from."""

    train_dataset: str | None = field(
        default=None, **shown("yaml with `datasets:`, or a Visual-CoT .jsonl or .json")
    )
    eval_dataset: str | None = field(
        default=None, **shown("likewise, for losses and hits with --evaluation_strategy")
    )
    img_dir: str = field(default="datas", **shown("pictures: IMG_DIR/cot/DATASET/IMAGE"))
    sampling_seed: int = 42
    version: str = field(default="auto", **shown("prompt template; auto: what the checkpoint says"))
    box_frame: str = field(
        default="seen",
        **shown("seen, or released: boxes as shares of the picture before padding"),
    )
    max_pixels: int | None = field(
        default=None, **shown("largest area of an image that keeps its shape; default: the model's")
    )
    max_input_seq_length: int | None = field(
        default=None, **shown("leaves out samples whose prompt has more tokens")
    )
    max_input_remain_seq_length: int | None = field(
        default=None, **shown("likewise, without the visual tokens outside of the boxes")
    )


@dataclass
class BoxTrainingArguments(TrainingArguments):
    """The Trainer's arguments with the paper's values, for both of its stages."""

    learning_rate: float = 1e-4
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.1
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 8
    logging_steps: float = 10
    save_steps: float = 500

    def foreign(self) -> dict[str, bool]:
        """Flags of `llava.train.train` that neither stage follows -> whether they are set."""
        return {
            "lora_enable": self.lora_enable,
            "bits": self.bits != 16,
            "neftune_noise_alpha": self.neftune_noise_alpha is not None,
            "group_by_length": self.group_by_length,
            "group_by_modality_length": self.group_by_modality_length,
            "mm_projector_lr": self.mm_projector_lr is not None,
            "mm_vision_tower_lr": self.mm_vision_tower_lr is not None,
            "freeze_mm_mlp_adapter": self.freeze_mm_mlp_adapter,
        }


@dataclass
class GlimpseTrainingArguments(BoxTrainingArguments):
    """Those of a glimpse, with the weights of its losses."""

    le_weight: float = 1.0
    loc_weight: float = 1.0
    loc_loss_class: str = field(default="MaskLoss", **shown("MaskLoss, DiceLoss or BCELoss"))
    loc_dice_weight: float = 1.0
    loc_bce_weight: float = 0.1
    kd_weight: float = field(default=0.0, **shown("accepted: 0, it belongs to reinforcement"))
    reward_weight: float = field(default=0.0, **shown("accepted: 0, likewise"))
    num_generations: int = field(default=1, **shown("accepted: 1, likewise"))
    save_layout: str = field(
        default="ours", **shown("of the result: ours, or released (new_modules_gp.pt)")
    )

    @property
    def loss_weights(self) -> LossWeights:
        return filled(LossWeights, self)

    def refuse_other_recipes(self) -> None:
        """Raises ValueError for flags that ask for something else to be trained."""
        others = {
            **self.foreign(),
            "kd_weight": self.kd_weight,
            "reward_weight": self.reward_weight,
            "num_generations": self.num_generations != 1,
        }
        if asked := [name for name, value in others.items() if value]:
            raise ValueError(
                f"{', '.join(asked)} cannot be set: only a glimpse is trained, on a frozen model; "
                "an adapter is trained by llava.train.train_glimpseprune_plus"
            )
        if self.save_layout not in LAYOUTS:
            raise ValueError(
                f"save_layout {self.save_layout!r} is unknown, choose from {', '.join(LAYOUTS)}"
            )


def given_values(arguments, names: Sequence[str]) -> dict:
    """Those of `names` that are not None; lists as tuples."""
    values = {name: getattr(arguments, name) for name in names}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if value is not None
    }


def with_config(words: Sequence[str]) -> list[str]:
    """The command line with the flags of its `--config FILE.yaml` in front of its own."""
    words = [part for word in words for part in _apart(word)]
    if "--config" not in words:
        return words
    place = words.index("--config")
    if place + 1 == len(words):
        raise ValueError("--config needs the name of a yaml file")
    path = words[place + 1]
    values = read_yaml(path)
    for name, value in (values.pop("env", None) or {}).items():
        os.environ[name] = str(value)
    flags, last = [], []
    for name, value in values.items():
        if isinstance(value, dict):
            raise ValueError(f"{path}: {name} must be a value or a list")
        if value == [] and name in EMPTY:
            last += EMPTY[name]
        elif value is not None:
            several = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *map(str, several)]
    return [*flags, *last, *words[:place], *words[place + 2 :]]


def _apart(word: str) -> list[str]:
    """`--config=FILE` as the two words that it stands for."""
    return ["--config", word.partition("=")[2]] if word.startswith("--config=") else [word]
