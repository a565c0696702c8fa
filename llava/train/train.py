"""Trains LLaVA and Qwen2.5-VL: projector pretraining, full fine-tuning or LoRA.

    python -m llava.train.train --model_name_or_path CHECKPOINT --version v1 --data_path data.json \
        --image_folder images --vision_tower openai/clip-vit-large-patch14-336 --output_dir OUT ...

Several processes: `accelerate launch -m llava.train.train ...` or `deepspeed llava/train/train.py`.
A run whose output folder holds `checkpoint-*` continues from the newest. See docs/Training.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import transformers

from llava.train.arguments import LORA_BIASES, DataArguments, ModelArguments, TrainingArguments
from llava.train.data import check_data_path, make_supervised_data_module
from llava.train.fsdp import check_fsdp_devices
from llava.train.llava_trainer import LLaVATrainer
from llava.train.model_setup import (
    add_lora,
    add_pruner,
    check_trained,
    choose_family,
    chosen_pruner,
    ready_backbone,
    sees,
    settle_dtypes,
)
from llava.train.processes import leave_group
from llava.train.run import FlagParser, check_trainer_flags, given_flags, run
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

    def ready(words: Sequence[str]) -> LLaVATrainer:
        return prepare(words, attn_implementation, pruner, callbacks)

    trainer = run(ready, args)
    trainer.model.config.use_cache = True
    return trainer


def prepare(
    words: Sequence[str], attn_implementation: str | None = None, pruner=None, callbacks=()
) -> LLaVATrainer:
    """Everything up to the first step: arguments, model, tokenizer, data, Trainer."""
    parser = FlagParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse(words)
    given = given_flags(words)
    check_flags(model_args, data_args, training_args)
    pruner = chosen_pruner(model_args, pruner)
    if training_args.gradient_checkpointing and training_args.gradient_checkpointing_kwargs is None:
        training_args.gradient_checkpointing_kwargs = {"use_reentrant": False}
    if model_args.unfreeze_mm_vision_tower and training_args.ddp_find_unused_parameters is None:
        # What a tower has behind the selected layer gets no gradient; nobody may wait for it.
        training_args.ddp_find_unused_parameters = True
    # Weights that no checkpoint brings (a new projector, LoRA) must not depend on the past.
    transformers.set_seed(training_args.seed)
    if training_args.fsdp and (training_args.lora_enable or model_args.tune_mm_mlp_adapter):
        refuse_fsdp("LoRA or the projector alone")
    check_fsdp_devices(training_args)
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
        add_pruner(whole, pruner, data_args)
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


def check_flags(model_args, data_args, training_args) -> None:
    """Raises ValueError or FileNotFoundError for flags that do not go together, and data that are
    not there, before a model is loaded."""
    check_data_path(data_args.data_path)
    check_trainer_flags(training_args)
    if training_args.lora_enable and model_args.tune_mm_mlp_adapter:
        raise ValueError(
            "--tune_mm_mlp_adapter trains the projector alone, --lora_enable an adapter beside it: "
            "leave one out"
        )
    if training_args.lora_enable and training_args.lora_bias not in LORA_BIASES:
        known = ", ".join(LORA_BIASES)
        raise ValueError(f"lora_bias {training_args.lora_bias!r} is unknown, choose from {known}")


if __name__ == "__main__":
    train()
    leave_group()
