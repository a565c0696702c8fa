"""The options that say which model is loaded, and how: the same in every program."""

from __future__ import annotations

import argparse

import torch

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def add_option(parser, flag: str, **kwargs) -> None:
    """Adds `--some-flag`, which may also be written `--some_flag`, to a parser or a group."""
    parser.add_argument(*dict.fromkeys((flag, "--" + flag[2:].replace("-", "_"))), **kwargs)


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `load_from_args` reads."""
    group = parser.add_argument_group("model")
    add_option(group, "--model-path", help="default: the playground checkpoint")
    add_option(group, "--model-base", help="base model of a projector or LoRA checkpoint")
    add_option(group, "--vision-tower", metavar="DIR", help="replaces the checkpoint's own")
    add_option(group, "--device", help="cuda, mps or cpu (default: the best there is)")
    add_option(group, "--dtype", choices=DTYPES, help="default: what suits the device")
    add_option(group, "--load-8bit", action="store_true")
    add_option(group, "--load-4bit", action="store_true")
    add_option(group, "--attn-implementation", help="sdpa, flash_attention_2 or eager")


def load_from_args(args, path: str, name: str, pruner=None) -> tuple:
    """(tokenizer, model, image processor) of the checkpoint at `path`, as the options ask for.

    name: what the checkpoint is called, which says what kind of model it is
    Raises ValueError on a model that cannot look at images.
    """
    from llava.model.builder import load_pretrained_model

    tokenizer, model, image_processor, _ = load_pretrained_model(
        path,
        args.model_base,
        name,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
        device=args.device,
        torch_dtype=DTYPES.get(args.dtype),
        attn_implementation=args.attn_implementation,
        pruner=pruner,
        vision_tower=args.vision_tower,
        generation_strategy=getattr(args, "generation_strategy", None),
    )
    if image_processor is None:
        raise ValueError(f"{path} is a model without a vision tower: it cannot look at images")
    return tokenizer, model, image_processor
