"""From command-line options to a loaded model with an answer loop around it."""

import argparse
from dataclasses import fields

import torch

from llava.conversation import conv_templates
from llava.eval.answer_loop import AnswerLoop
from llava.mm_utils import infer_conv_mode

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model is loaded, and how."""
    group = parser.add_argument_group("model")
    group.add_argument("--model-path", "--model_path", help="default: the playground checkpoint")
    group.add_argument("--model-base", "--model_base", help="for partial checkpoints")
    group.add_argument("--vision-tower", "--vision_tower", help="replaces the checkpoint's own")
    group.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    group.add_argument("--dtype", choices=sorted(DTYPES), help="default: what suits the device")
    group.add_argument("--load-8bit", "--load_8bit", action="store_true")
    group.add_argument("--load-4bit", "--load_4bit", action="store_true")
    group.add_argument("--attn-implementation", "--attn_implementation")


def add_speed_args(parser, batch_size: int = 1) -> None:
    """Adds the options that change how fast answers come, and not what they are."""
    parser.add_argument("--batch-size", "--batch_size", type=int, default=batch_size)
    parser.add_argument("--workers", type=int, default=4, help="threads that prepare images")
    parser.add_argument(
        "--reuse",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute what the questions about one image share once",
    )


def load_loop(args) -> AnswerLoop:
    """Returns the answer loop around the model that the options name.

    args.pruner, when there is one, is the method in use; options of `AnswerLoop` that args lacks
    have their defaults.
    """
    from llava.model.builder import load_pretrained_model

    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        args.model_name,
        load_8bit=args.load_8bit,
        load_4bit=args.load_4bit,
        device=args.device,
        torch_dtype=DTYPES.get(args.dtype),
        attn_implementation=args.attn_implementation,
        pruner=getattr(args, "pruner", None),
        vision_tower=args.vision_tower,
        generation_strategy=getattr(args, "generation_strategy", None),
    )
    if image_processor is None:
        raise ValueError(f"{args.model_path} has no vision tower: it cannot look at images")
    given = {field.name for field in fields(AnswerLoop)} & vars(args).keys()
    options = {name: getattr(args, name) for name in given}
    return AnswerLoop(tokenizer, model, image_processor, **options)


def resolve_conv_mode(conv_mode: str, model_name: str) -> str:
    """Returns the template name; raises ValueError on an unknown one.

    "auto" goes by the model's name. Checkpoints named "plain" were trained with the `_mmtag`
    variant of their template.
    """
    if conv_mode == "auto":
        conv_mode = infer_conv_mode(model_name)
    plain = "plain" in model_name and "finetune" not in model_name.lower()
    if plain and "mmtag" not in conv_mode:
        conv_mode += "_mmtag"
        print(f"{model_name} looks like a plain model: using the conv mode {conv_mode}")
    if conv_mode not in conv_templates:
        names = ", ".join(conv_templates)
        raise ValueError(f"unknown conv mode {conv_mode!r}, choose from auto, {names}")
    return conv_mode
