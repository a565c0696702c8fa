"""Asks a model one question about one or several images, and prints its answer.

    python -m llava.eval.run_llava --model-path liuhaotian/llava-v1.5-7b --image-file view.jpg \
        --query "What is shown here?" --pruning-method vispruner --show-pruning kept.png

Without a model the playground's is used, without an image one of its benchmark.
"""

from __future__ import annotations

import argparse
import os
import sys
from types import SimpleNamespace

import torch
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.errors import errors_as_messages
from llava.mm_utils import load_image
from llava.model_args import add_asking_args, add_option, load_front_end, sampling
from llava.playground import default_image
from llava.pruning import trace_pruning
from llava.pruning.cli import pairs_in
from llava.pruning.picture import show_pruning

DEFAULT_QUERY = "What color is the ring?\nAnswer the question using a single word or phrase."
PICTURE_TYPES = (".png", ".jpg", ".webp")


def image_parser(args) -> list[str]:
    """The files and URLs in `args.image_file`, which `args.sep` stands between."""
    return args.image_file.split(args.sep)


def load_images(image_files: list[str]) -> list[Image.Image]:
    """RGB images from files and URLs, upright and on white."""
    return [load_image(name) for name in image_files]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_option(parser, "--image-file", help="file or URL; several with --sep between them")
    add_option(parser, "--query", help=f"{IMAGE_PLACEHOLDER} in it says where an image goes")
    add_option(parser, "--sep", default=",", help="between image files (default: a comma)")
    add_option(parser, "--temperature", type=float, default=0.2, help="0: no sampling")
    add_option(parser, "--top-p", type=float)
    add_option(parser, "--num-beams", type=int, default=1)
    add_option(parser, "--max-new-tokens", type=int, default=512)
    add_option(parser, "--show-pruning", metavar="FILE.png", help="draw the patches that were kept")
    add_asking_args(parser)
    return parser


def with_marks(query: str, num_images: int) -> str:
    """The query with an image token for every placeholder, or one in front if it has none.

    Raises ValueError unless it has a place for every image.
    """
    marked = query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    if IMAGE_PLACEHOLDER not in query:
        marked = f"{DEFAULT_IMAGE_TOKEN}\n{query}"
    if (num_marks := marked.count(DEFAULT_IMAGE_TOKEN)) != num_images:
        raise ValueError(
            f"{num_images} images, but the query has places for {num_marks}: write "
            f"{IMAGE_PLACEHOLDER} into it once for each image"
        )
    return marked


def check_picture_name(path: str | None) -> None:
    """Raises ValueError when no picture can be written to `path`; called before the model runs."""
    if path is None:
        return
    if os.path.splitext(path)[1].lower() not in PICTURE_TYPES:
        raise ValueError(f"--show-pruning {path!r} must end in {', '.join(PICTURE_TYPES)}")
    if not os.path.isdir(folder := os.path.dirname(path) or "."):
        raise ValueError(f"--show-pruning {path!r}: there is no folder {folder!r}")


@torch.inference_mode()
def answer(args) -> str:
    """The model's answer; also draws the picture of `args.show_pruning`."""
    if args.query is None and args.image_file is not None:
        raise ValueError("--query is missing: what should be asked about the image?")
    check_picture_name(args.show_pruning)
    query = DEFAULT_QUERY if args.query is None else args.query
    names = image_parser(args) if args.image_file else [default_image()]
    if args.image_file is None:
        print(f"image: {names[0]}; question: {query.splitlines()[0]}", file=sys.stderr)
    text = with_marks(query, len(names))
    images = load_images(names)
    front = load_front_end(args)

    ids = front.encode(front.prompt(text))
    pictures = [front.picture(image) for image in images]
    asked = query.replace(IMAGE_PLACEHOLDER, "").strip()
    with trace_pruning(front.model) as trace:
        inputs = front.inputs([ids], [pictures], [asked])
        output = front.model.generate(**inputs, **sampling(args))
    found = front.decode(output)[0]
    if args.show_pruning:
        asked = query.replace(IMAGE_PLACEHOLDER, "...")
        caption = f"Question: {asked} Answer: {found}"
        show_pruning(images, trace, ids, front.model, caption).save(args.show_pruning)
    return found


def eval_model(args) -> None:
    """Prints the answer. `args` is any object with attributes named like the options, those of
    methods among them (`important_ratio`); those it lacks have their defaults."""
    defaults = vars(build_parser().parse_args([]))
    options = SimpleNamespace(**{key: getattr(args, key, defaults[key]) for key in defaults})
    options.pruning_arg = [*options.pruning_arg, *pairs_in(args)]
    print(answer(options))


@errors_as_messages()
def main() -> None:
    eval_model(build_parser().parse_args())


if __name__ == "__main__":
    main()
