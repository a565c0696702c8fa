"""Trains LLaVA and Qwen2.5-VL: projector pretraining, full fine-tuning or LoRA.

    python -m llava.train.train --model_name_or_path CHECKPOINT --version v1 --data_path data.json \
        --image_folder images --vision_tower openai/clip-vit-large-patch14-336 --output_dir OUT ...

Several processes: `accelerate launch -m llava.train.train ...` or `deepspeed llava/train/train.py`.
A run whose output folder holds `checkpoint-*` continues from the newest. See docs/Training.md.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import transformers
from accelerate.state import AcceleratorState

from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.data import make_supervised_data_module
from llava.train.llava_trainer import LLaVATrainer
from llava.train.model_setup import (
    add_lora,
    add_pruner,
    check_trained,
    choose_family,
    ready_backbone,
    sees,
    settle_dtypes,
)
from llava.train.processes import leave_group
from llava.train.zero import join_processes, refuse_fsdp


def train(
    args: Sequence[str] | None = None,
    attn_implementation: str | None = None,
    pruner=None,
    callbacks: Sequence[transformers.TrainerCallback] = (),
) -> LLaVATrainer:
    """Runs a whole training and returns the Trainer (its model is `.model`).

    args:                command-line words, default those of this process
    attn_implementation: "sdpa", "flash_attention_2" or "eager"
    pruner:              a `llava.pruning.Pruner` to train with, instead of --pruning_method
    callbacks:           further Trainer callbacks
    """
    words = list(sys.argv[1:] if args is None else args)
    with own_precision():
        trainer = prepare(words, attn_implementation, pruner, callbacks)
        output = pathlib.Path(trainer.args.output_dir)
        trainer.train(resume_from_checkpoint=any(output.glob("checkpoint-*")))
        trainer.save_state()
        trainer.model.config.use_cache = True
        trainer.save_model(str(output))
    return trainer


def prepare(
    words: Sequence[str], attn_implementation: str | None = None, pruner=None, callbacks=()
) -> LLaVATrainer:
    """Everything up to the first step: arguments, model, tokenizer, data, Trainer."""
    parser = transformers.HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses(args=list(words))
    if training_args.gradient_checkpointing and training_args.gradient_checkpointing_kwargs is None:
        training_args.gradient_checkpointing_kwargs = {"use_reentrant": False}
    given = {word.lstrip("-").split("=")[0] for word in words if word.startswith("--")}
    # Weights that no checkpoint brings (a new projector, LoRA) must not depend on the past.
    transformers.set_seed(training_args.seed)
    if training_args.fsdp and (training_args.lora_enable or model_args.tune_mm_mlp_adapter):
        refuse_fsdp("LoRA or the projector alone")
    join_processes(training_args)
    family = choose_family(model_args, training_args, given)
    model = family.load_model(model_args, data_args, training_args, given, attn_implementation)
    whole = model
    ready_backbone(family, model, model_args, training_args)
    if training_args.lora_enable:
        model = add_lora(family, model, training_args)
    tokenizer = family.load_tokenizer(training_args)
    conv = family.choose_template(tokenizer, whole, model_args.version)
    family.add_vision(whole, tokenizer, model_args, data_args, training_args)
    if sees(whole):
        add_pruner(whole, model_args, data_args, pruner)
    settle_dtypes(model, training_args)
    check_trained(model)
    return LLaVATrainer(
        family=family,
        model=model,
        tokenizer=tokenizer,
        args=training_args,
        callbacks=list(callbacks),
        **make_supervised_data_module(tokenizer, data_args, conv),
    )


@contextmanager
def own_precision() -> Iterator[None]:
    """Keeps precision, DeepSpeed and FSDP of this run from those of later ones in this process."""

    def settings() -> dict[str, str]:
        prefixes = ("ACCELERATE_", "FSDP_")
        return {key: value for key, value in os.environ.items() if key.startswith(prefixes)}

    before = settings()
    try:
        yield
    finally:
        AcceleratorState._reset_state()
        for key in settings().keys() - before.keys():
            del os.environ[key]
        os.environ.update(before)


if __name__ == "__main__":
    train()
    leave_group()
