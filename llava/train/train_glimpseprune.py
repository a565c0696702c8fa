"""Trains the glimpse of GlimpsePrune on questions with boxes; the model itself stays as it is.

    python -m llava.train.train_glimpseprune --model_name_or_path liuhaotian/llava-v1.5-7b \
        --train_dataset gqa_cot_train.jsonl --img_dir datas --bf16 True --output_dir OUT
    python -m llava.train.train_glimpseprune --config recipe.yaml --output_dir OUT

Keys of the yaml file are the flags; flags on the command line win, `env:` sets environment
variables. Several processes: `accelerate launch -m llava.train.train_glimpseprune ...`. A run whose
output folder holds `checkpoint-*` continues from the newest. See docs/Training.md.
"""

from __future__ import annotations

import math
import os
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import transformers

from llava.conv_mode import CONFIG_KEY, announce, checkpoint_conv_mode
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.pruning.glimpseprune import DEFAULTS, GlimpsePrune
from llava.pruning.glimpseprune_modules import Glimpse, GlimpseConfig
from llava.pruning.learned import read_part, save_part
from llava.train.processes import leave_group

from .arguments import TrainingArguments
from .glimpseprune_data import BoxCollator, BoxDataset, read_datasets, read_yaml
from .glimpseprune_loss import GlimpseObjective, LossWeights
from .llava_trainer import LLaVATrainer
from .saving import gathered
from .train import own_precision
from .zero import join_processes, kept_whole, refuse_fsdp, register_parameter

#: fields of `GlimpseArguments` that make the shape of the trained part
SHAPE = (
    "selected_layers reduce_layer le_layers le_length le_dropout_prob selected_visual_layers "
    "attn_fuse_size visual_cond_size attn_fuse_num_heads use_attention_logits deep_supervision"
).split()


@dataclass
class GlimpseArguments:
    """The model, and the shape of what is trained; None: the paper's, scaled to the depth."""

    model_name_or_path: str = "liuhaotian/llava-v1.5-7b"
    attn_implementation: str = "sdpa"
    load_new_modules: str | None = field(
        default=None, metadata={"help": "folder of a trained part to start from"}
    )
    selected_layers: list[int] | None = field(
        default=None, metadata={"help": "decoder layers whose attention row is read"}
    )
    reduce_layer: int | None = field(
        default=None, metadata={"help": "last decoder layer that sees all visual tokens"}
    )
    le_layers: list[int] | None = field(
        default=None, metadata={"help": "layers before which a vector joins the glimpse; with 0"}
    )
    le_length: int = 1
    le_dropout_prob: float = 0.1
    selected_visual_layers: list[int] | None = field(
        default=None, metadata={"help": "hidden states of the tower, deepest first"}
    )
    attn_fuse_size: int = 256
    visual_cond_size: int = 512
    attn_fuse_num_heads: int = 4
    use_attention_logits: bool = False
    deep_supervision: bool = False


@dataclass
class BoxArguments:
    """Where questions and boxes come from."""

    train_dataset: str | None = field(
        default=None, metadata={"help": "yaml with `datasets:`, or a Visual-CoT .jsonl or .json"}
    )
    img_dir: str = field(default="datas", metadata={"help": "pictures: IMG_DIR/cot/DATASET/IMAGE"})
    sampling_seed: int = 42
    version: str = field(
        default="auto", metadata={"help": "prompt template; auto: what the checkpoint says"}
    )
    box_frame: str = field(
        default="seen",
        metadata={"help": "seen, or released: boxes as shares of the picture before padding"},
    )


@dataclass
class GlimpseTrainingArguments(TrainingArguments):
    """The Trainer's arguments with the paper's values, and the weights of the losses."""

    learning_rate: float = 1e-4
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.1
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 8
    logging_steps: float = 10
    save_steps: float = 500
    le_weight: float = 1.0
    loc_weight: float = 1.0
    loc_loss_class: str = field(
        default="MaskLoss", metadata={"help": "MaskLoss, DiceLoss or BCELoss"}
    )
    loc_dice_weight: float = 1.0
    loc_bce_weight: float = 0.1

    @property
    def loss_weights(self) -> LossWeights:
        names = LossWeights.__dataclass_fields__
        return LossWeights(**{name: getattr(self, name) for name in names})


def train(args: Sequence[str] | None = None) -> GlimpseTrainer:
    """Runs a whole training and returns its Trainer.

    args: command-line words, default those of this process
    """
    words = list(sys.argv[1:] if args is None else args)
    with own_precision():
        trainer = prepare(words)
        output = pathlib.Path(trainer.args.output_dir)
        trainer.train(resume_from_checkpoint=any(output.glob("checkpoint-*")))
        trainer.save_state()
        trainer.save_model(str(output))
    return trainer


def prepare(words: Sequence[str]) -> GlimpseTrainer:
    """Everything up to the first step."""
    classes = (GlimpseArguments, BoxArguments, GlimpseTrainingArguments)
    parser = transformers.HfArgumentParser(classes)
    model_args, box_args, training_args = parser.parse_args_into_dataclasses(with_config(words))
    if box_args.train_dataset is None:
        raise ValueError("--train_dataset is missing: a yaml file, or a Visual-CoT .jsonl or .json")
    name = get_model_name_from_path(model_args.model_name_or_path)
    version = checkpoint_conv_mode(
        model_args.model_name_or_path, model_name=name, given=box_args.version
    )
    announce(version)
    if training_args.fsdp:
        refuse_fsdp("a glimpse")
    transformers.set_seed(training_args.seed)
    join_processes(training_args)
    with kept_whole(training_args):  # DeepSpeed splits it later, with all that is trained
        tokenizer, model, processor, _ = load_pretrained_model(
            model_args.model_name_or_path,
            None,
            name,
            device_map=None,
            device=training_args.device,
            torch_dtype=training_args.compute_dtype,
            attn_implementation=model_args.attn_implementation,
        )
    if getattr(model.config, "image_aspect_ratio", None) == "anyres":
        raise ValueError(
            f"{model_args.model_name_or_path} cuts images into tiles (image_aspect_ratio anyres), "
            "but a glimpse is trained on images of one crop: take a LLaVA-1.5 model"
        )
    tower = model.get_vision_tower()
    model.pruner = fresh_method(model, model_args)
    samples = read_datasets(box_args.train_dataset, box_args.img_dir, box_args.sampling_seed)
    return GlimpseTrainer(
        model=GlimpseObjective(model, training_args.loss_weights),
        base_model=model_args.model_name_or_path,
        conv_mode=version.name,
        tokenizer=tokenizer,
        args=training_args,
        train_dataset=BoxDataset(
            samples,
            tokenizer,
            processor,
            model.config,
            (tower.num_patches_per_side,) * 2,
            conv_templates[version.name],
            box_args.box_frame,
        ),
        data_collator=BoxCollator(tokenizer.pad_token_id or 0),
    )


def with_config(words: Sequence[str]) -> list[str]:
    """The command line with the flags of its `--config FILE.yaml` in front of its own."""
    words = list(words)
    if "--config" not in words:
        return words
    place = words.index("--config")
    if place + 1 == len(words):
        raise ValueError("--config needs the name of a yaml file")
    path = words[place + 1]
    values = read_yaml(path)
    for name, value in (values.pop("env", None) or {}).items():
        os.environ[name] = str(value)
    flags = []
    for name, value in values.items():
        if isinstance(value, dict):
            raise ValueError(f"{path}: {name} must be a value or a list")
        if value is not None:
            several = value if isinstance(value, list) else [value]
            flags += [f"--{name}", *map(str, several)]
    return [*flags, *words[:place], *words[place + 2 :]]


def fresh_method(model, model_args: GlimpseArguments) -> GlimpsePrune:
    """GlimpsePrune for `model` with new weights in fp32, or those of `load_new_modules`."""
    given = {name: getattr(model_args, name) for name in SHAPE}
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None
    }
    if model_args.load_new_modules is not None:
        pruner = GlimpsePrune(new_modules=model_args.load_new_modules)
        pruner.module = pruner.load(model).float()
        return pruner
    if "selected_layers" in given:
        given.setdefault("reduce_layer", max(given["selected_layers"]))
    pruner = GlimpsePrune()
    pruner.module = Glimpse(GlimpseConfig.for_model(model, **given))
    pruner.module.initialize()
    pruner.module.to(model.device)
    return pruner


class GlimpseTrainer(LLaVATrainer):
    """Trains and saves the pruning method's part alone; logs its losses and what it finds of boxes.

    model: a `GlimpseObjective`; base_model, conv_mode: what goes into config.json
    """

    def __init__(self, *args, base_model: str, conv_mode: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.base_model, self.conv_mode = base_model, conv_mode
        if self.is_deepspeed_enabled:
            register_parameter(self.model, self.part.learnable_embeddings)
        self._sums: dict[str, torch.Tensor] = {}

    @property
    def hidden_size(self) -> int:
        return self.model.llava.config.hidden_size

    @property
    def part(self) -> Glimpse:
        """What is trained."""
        return self.accelerator.unwrap_model(self.model).glimpse

    def compute_loss(self, model, inputs, return_outputs: bool = False):
        out = model(**inputs)
        for name, value in out.items():
            if name != "loss":
                self._sums[name] = self._sums.get(name, 0) + value.float()
        self._sums["steps"] = self._sums.get("steps", 0) + torch.ones_like(out["loss"]).float()
        return (out["loss"], out) if return_outputs else out["loss"]

    def log(self, logs: dict[str, float]) -> None:
        if self._sums and "loss" in logs:
            sums = {k: self.accelerator.reduce(v, "sum") for k, v in self._sums.items()}
            logs = {**logs, **found_boxes(sums.pop("hits").tolist())}
            steps = sums.pop("steps")
            for name, total in sums.items():
                mean = (total / steps).flatten().tolist()
                names = [name] if len(mean) == 1 else [f"{name}_{i}" for i in range(len(mean))]
                logs |= {key: round(value, 4) for key, value in zip(names, mean, strict=True)}
            self._sums = {}
        super().log(logs)

    # --- checkpoints --------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained part: in fp32 during training, at the end in the computing type.
        Called by every process."""
        weights = {name: gathered(p) for name, p in self.part.named_parameters()}
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        dtype = torch.float32 if _internal_call else self.args.compute_dtype
        weights = {name: value.to(dtype) for name, value in weights.items()}
        values = DEFAULTS | {"anchor_positions": [], CONFIG_KEY: self.conv_mode}
        values |= self.part.config.values()
        save_part(folder, GlimpsePrune.name, weights, self.base_model, **values)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        _, weights = read_part(resume_from_checkpoint)
        self.part.load_state_dict(weights)


def found_boxes(hits: Sequence[float]) -> dict[str, float]:
    """Precision, recall, F1 and IoU of patches from true positives, false positives, misses."""
    right, wrong, missed = hits
    shares = {
        "precision": (right, right + wrong),
        "recall": (right, right + missed),
        "f1": (2 * right, 2 * right + wrong + missed),
        "iou": (right, right + wrong + missed),
    }
    return {
        name: round(part / all_, 4) if all_ else math.nan for name, (part, all_) in shares.items()
    }


if __name__ == "__main__":
    train()
    leave_group()
