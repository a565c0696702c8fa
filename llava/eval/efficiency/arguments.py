"""What the command lines of this room have in common."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

from llava.conv_mode import resolve_conv_mode
from llava.mm_utils import get_model_name_from_path
from llava.model.placement import choose_device, fast_dtype
from llava.model_args import DTYPES, add_conv_mode_arg
from llava.playground import benchmark_dir, default_model_path

IMAGES = "images"


def add_question_args(parser, questions: str) -> None:
    """Which questions are asked; questions: the file of the playground that is read by default."""
    parser.add_argument(
        "--question-file", help=f"questions (default: the playground's {questions})"
    )
    parser.add_argument("--image-folder", help="folder of their images (default: the playground's)")
    add_conv_mode_arg(parser, "auto")


def fill_in_questions(args: argparse.Namespace, questions: str) -> None:
    """Names the playground's questions and pictures where no others were given, and the template of
    the model, which is the playground's where none is named."""
    if args.question_file is None:
        args.question_file = os.path.join(benchmark_dir(), questions)
        args.image_folder = args.image_folder or os.path.join(benchmark_dir(), IMAGES)
    args.image_folder = args.image_folder or os.path.dirname(args.question_file)
    path = default_model_path(args.model_path)
    args.model_name = get_model_name_from_path(path)
    args.conv_mode = resolve_conv_mode(args.conv_mode, args.model_name, path, args.model_base)


def add_layers_arg(parser) -> None:
    parser.add_argument(
        "--layers", type=int, help="number of decoder layers (default: those of --config)"
    )


def add_shape_args(parser) -> None:
    """What is cut, or varies, of a model with random weights and its images."""
    add_layers_arg(parser)
    parser.add_argument(
        "--image-size",
        type=image_size,
        metavar="WIDTHxHEIGHT",
        help="pixels of an image, for models whose images have grids of their own "
        "(Qwen2.5-VL: 672x672, which is 576 tokens)",
    )


def image_size(text: str) -> tuple[int, int]:
    """(width, height) of words such as 1024x768."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 1024x768")
    return int(parts[0]), int(parts[1])


def check_layers(layers: int | None) -> None:
    """Raises ValueError for a number of layers that leaves none."""
    if layers is not None and layers < 1:
        raise ValueError(f"--layers ({layers}) must be at least 1")


def placed(args: argparse.Namespace) -> dict:
    """`dtype` and `device` of a model of random weights: those asked for, else what is fast."""
    device = choose_device(args.device)
    return {"dtype": DTYPES[args.dtype] if args.dtype else fast_dtype(device), "device": device}


def add_rounds_args(parser) -> None:
    """How often the variants run, and by which clock."""
    add = parser.add_argument
    add("--repeats", type=int, default=20, help="timed rounds (default: 20)")
    add("--warmup", type=int, default=3, help="rounds before those that count (default: 3)")
    add(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="begin no further round of a table after so long (default: none); the table says how "
        "many rounds there were",
    )
    add_clock_arg(parser)


def check_rounds(args: argparse.Namespace) -> None:
    """Raises ValueError for rounds that measure nothing."""
    if args.repeats < 1:
        raise ValueError("--repeats must be at least 1")
    if args.warmup < 0:
        raise ValueError("--warmup must not be negative")
    if args.time_limit is not None and args.time_limit <= 0:
        raise ValueError(f"--time-limit ({args.time_limit:g}) must be more than 0 seconds")


def add_clock_arg(parser) -> None:
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="processor seconds in place of wall time, for a CPU that is busy with other programs, "
        "whose turns then do not count",
    )


def clock_of(args: argparse.Namespace, device) -> Callable[[], float]:
    """Says what time it is, in seconds. Raises ValueError where processors say nothing of it."""
    if not args.processor_time:
        return time.perf_counter
    if device.type != "cpu":
        raise ValueError(f"--processor-time says nothing of work on {device}: leave it out")
    return time.process_time
