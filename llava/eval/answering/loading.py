"""From command-line options to a loaded model with an answer loop around it."""

import argparse
from dataclasses import fields

from llava.conv_mode import announce, checkpoint_conv_mode
from llava.eval.answering.loop import AnswerLoop
from llava.eval.answering.run_settings import settings_of
from llava.model_args import DTYPES, add_model_args, load_from_args

__all__ = ["DTYPES", "add_model_args", "add_speed_args", "load_loop", "resolve_conv_mode"]
__all__ += ["add_image_args", "settings_of"]


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
    parser.add_argument(
        "--skip-bad",
        "--skip_bad",
        action="store_true",
        help="record a question that cannot be answered as failed, and go on",
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


def resolve_conv_mode(
    conv_mode: str, model_name: str, model_path: str | None = None, model_base: str | None = None
) -> str:
    """Returns the template name; raises ValueError on an unknown one.

    "auto" is what the checkpoint at `model_path` says of itself, with the reason in one line. A
    projector without a tuned language model behind it, called "plain", was trained with the
    `_mmtag` variant of its template.
    """
    choice = checkpoint_conv_mode(model_path, model_base, model_name, conv_mode)
    announce(choice)
    return choice.name
