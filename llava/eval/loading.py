"""From command-line options to a loaded model with an answer loop around it."""

import argparse
from dataclasses import fields

from llava.conversation import conv_templates
from llava.eval.answer_loop import AnswerLoop
from llava.eval.answers import fingerprint
from llava.eval.model_args import DTYPES, add_model_args, load_from_args
from llava.mm_utils import infer_conv_mode

__all__ = ["DTYPES", "add_model_args", "add_speed_args", "load_loop", "resolve_conv_mode"]
__all__ += ["add_image_args", "settings_of"]

#: options that answers depend on; those that a program lacks count as None
SETTINGS = ("model_base", "vision_tower", "conv_mode", "temperature", "top_p", "num_beams")
SETTINGS += ("max_new_tokens", "dtype", "load_8bit", "load_4bit")
SETTINGS += ("single_pred_prompt", "lang")  # some programs only; they change what the model reads


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


def add_image_args(parser) -> None:
    """Adds the option that says how images are read."""
    parser.add_argument(
        "--upright-images",
        "--upright_images",
        action="store_true",
        help="turn images upright as their EXIF data say and put transparent ones on white; "
        "published results did neither",
    )


def load_loop(args) -> AnswerLoop:
    """Returns the answer loop around the model that the options name.

    args.pruner, when there is one, is the method in use; options of `AnswerLoop` that args lacks
    have their defaults.
    """
    pruner = getattr(args, "pruner", None)
    loaded = load_from_args(args, args.model_path, args.model_name, pruner)
    given = {field.name for field in fields(AnswerLoop)} & vars(args).keys()
    options = {name: getattr(args, name) for name in given}
    return AnswerLoop(*loaded, **options)


def settings_of(args, pruner) -> dict:
    """Returns what must agree for two runs to continue each other's answers."""
    parts = [fingerprint(folder) for folder in pruner.part_folders(args.model_path)]
    return {name: getattr(args, name, None) for name in SETTINGS} | {
        "model": args.model_name,
        "weights": fingerprint(args.model_path),
        "pruner": repr(pruner),
        **({"trained_parts": parts} if parts else {}),
    }


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
