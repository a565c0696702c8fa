"""The options that say which model is loaded, and how: the same in every program."""

from __future__ import annotations

import argparse
import os

import torch

from llava.conv_mode import resolve_conv_mode
from llava.front_end import FrontEnd
from llava.mm_utils import get_model_name_from_path
from llava.playground import default_model_path
from llava.pruning.cli import add_pruning_args, pruner_from_args

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


#: settings of image processors that keep the proportions of an image
PIXELS = ("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels")


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `load_from_args` reads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model-path", help="folder, or name on the hub (default: the playground's)"
    )
    group.add_argument("--model-base", help="base model of a projector or LoRA checkpoint")
    group.add_argument(
        "--vision-tower", metavar="DIR", help="vision tower in place of the checkpoint's own"
    )
    group.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    group.add_argument(
        "--dtype", choices=DTYPES, help="type of numbers (default: what suits the device)"
    )
    group.add_argument("--load-8bit", action="store_true", help="weights of 8 bits (bitsandbytes)")
    group.add_argument("--load-4bit", action="store_true", help="weights of 4 bits (bitsandbytes)")
    group.add_argument(
        "--attn-implementation", help="sdpa, flash_attention_2 or eager (default: sdpa)"
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile decoding, on a GPU also prompts: see docs/Efficiency.md",
    )
    for name in PIXELS:
        what = "a frame of a video" if name.startswith("video") else "an image"
        help = f"bound of the area {what} is resized to (Qwen2.5-VL: 784 pixels are a token)"
        group.add_argument("--" + name.replace("_", "-"), type=int, help=help)


def load_from_args(args, path: str, name: str, pruner=None) -> tuple:
    """(tokenizer, model, image processor) of the checkpoint at `path`, as the options ask for.

    name: what the checkpoint is called, which says what kind of model it is
    Raises ValueError on a model that cannot look at images.
    """
    from llava.engine.options import engine_from_args
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
        compile=getattr(args, "compile", False),
        engine=engine_from_args(args),
    )
    if image_processor is None:
        raise ValueError(f"{path} is a model without a vision tower: it cannot look at images")
    for name in PIXELS:
        if (pixels := getattr(args, name, None)) is None:
            continue
        if not hasattr(image_processor, name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag}: images for {path} have one size, its own")
        setattr(image_processor, name, pixels)
    return tokenizer, model, image_processor


def add_conv_mode_arg(parser, default: str | None = None) -> None:
    """Adds the option that names a prompt template."""
    text = "prompt template (default: auto, the one that the checkpoint asks for)"
    parser.add_argument("--conv-mode", default=default, metavar="NAME", help=text)


def add_length_arg(parser, default: int) -> None:
    """Adds the option that says how long an answer may be."""
    text = "the most tokens that an answer has"
    parser.add_argument("--max-new-tokens", type=int, default=default, metavar="N", help=text)


def add_sampling_args(parser, beams: bool = True) -> None:
    """Adds the options beside --max-new-tokens that `sampling` reads. beams: with --num-beams"""
    add = parser.add_argument
    add(
        "--temperature",
        type=float,
        default=0.2,
        help="how freely tokens are drawn; 0: always the likeliest",
    )
    top = "sample only from the likeliest tokens that have this much probability together"
    add("--top-p", type=float, metavar="P", help=f"{top}, 0 to 1 (default: all tokens)")
    if beams:
        text = "answers that beam search follows at a time; 1: no beam search"
        add("--num-beams", type=int, default=1, metavar="N", help=text)


def add_asking_args(parser: argparse.ArgumentParser) -> None:
    """Adds what says which model is asked, and how; `load_front_end` reads it."""
    add_model_args(parser)
    add_conv_mode_arg(parser)
    add_pruning_args(parser)


def load_front_end(args) -> FrontEnd:
    """The model, with its method and its prompt template, that the options ask for."""
    pruner = pruner_from_args(args)  # before the model: a typing error should not cost a minute
    path = os.path.expanduser(default_model_path(args.model_path))
    name = get_model_name_from_path(path)
    conv_mode = resolve_conv_mode(args.conv_mode, name, path, args.model_base, compare=True)
    return FrontEnd(*load_from_args(args, path, name, pruner), conv_mode)


def sampling(args) -> dict:
    """The arguments of `generate` that choose tokens."""
    options = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    if args.temperature <= 0:
        return {"do_sample": False, **options}
    return {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, **options}
