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

from llava import model_args
from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IMAGE_PLACEHOLDER,
)
from llava.conv_mode import AUTO, announce, checkpoint_conv_mode
from llava.conversation import conv_templates
from llava.errors import errors_as_messages
from llava.mm_utils import (
    get_model_name_from_path,
    load_image,
    process_images,
    tokenizer_image_token,
)
from llava.model_args import add_option
from llava.playground import default_image, default_model_path
from llava.pruning import trace_pruning
from llava.pruning.cli import add_pruning_args, pairs_in, pruner_from_args
from llava.pruning.picture import show_pruning

DEFAULT_QUERY = "What color is the ring?\nAnswer the question using a single word or phrase."
PICTURE_TYPES = (".png", ".jpg", ".webp")


def image_parser(args) -> list[str]:
    """The files and URLs in `args.image_file`, which `args.sep` stands between."""
    return args.image_file.split(args.sep)


def load_images(image_files: list[str]) -> list[Image.Image]:
    """RGB images from files and URLs, upright and on white."""
    return [load_image(name) for name in image_files]


def add_model_args(parser: argparse.ArgumentParser) -> None:
    """Adds what says which model runs, and how; `load_model` reads it."""
    model_args.add_model_args(parser)
    add_option(
        parser, "--conv-mode", help="prompt template (default: what the checkpoint says of itself)"
    )
    add_pruning_args(parser)


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
    add_model_args(parser)
    return parser


def load_model(args):
    """(tokenizer, model, image processor, name of the prompt template) that the options ask for."""
    pruner = pruner_from_args(args)  # before the model: a typing error should not cost a minute
    path = os.path.expanduser(args.model_path or default_model_path())
    name = get_model_name_from_path(path)
    conv_mode = pick_conv_mode(args.conv_mode, path, args.model_base, name)
    return *model_args.load_from_args(args, path, name, pruner), conv_mode


def pick_conv_mode(given: str | None, path: str, base: str | None, name: str) -> str:
    """The template that was asked for, or else the checkpoint's own; a difference is said."""
    if given not in (None, AUTO, *conv_templates):
        raise ValueError(f"unknown --conv-mode {given!r}, choose from {', '.join(conv_templates)}")
    inferred = checkpoint_conv_mode(path, base, name)
    if given in (None, AUTO):
        announce(inferred)
        return inferred.name
    if given != inferred.name:
        print(
            f"[WARNING] the auto inferred conversation mode is {inferred.name}, while "
            f"`--conv-mode` is {given}, using {given}",
            file=sys.stderr,
        )
    return given


def image_mark(config) -> str:
    """What stands for an image in a prompt."""
    if getattr(config, "mm_use_im_start_end", False):
        return DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
    return DEFAULT_IMAGE_TOKEN


def mark_images(query: str, config) -> str:
    """The query with an image token for every placeholder, or one in front if it has none."""
    mark = image_mark(config)
    if IMAGE_PLACEHOLDER in query:
        return query.replace(IMAGE_PLACEHOLDER, mark)
    return f"{mark}\n{query}"


def check_image_count(num_images: int, query: str) -> None:
    """Raises ValueError unless the query has a place for every image."""
    num_marks = mark_images(query, None).count(DEFAULT_IMAGE_TOKEN)
    if num_marks != num_images:
        raise ValueError(
            f"{num_images} images, but the query has places for {num_marks}: write "
            f"{IMAGE_PLACEHOLDER} into it once for each image"
        )


def check_picture_name(path: str | None) -> None:
    """Raises ValueError when no picture can be written to `path`; called before the model runs."""
    if path is None:
        return
    if os.path.splitext(path)[1].lower() not in PICTURE_TYPES:
        raise ValueError(f"--show-pruning {path!r} must end in {', '.join(PICTURE_TYPES)}")
    if not os.path.isdir(folder := os.path.dirname(path) or "."):
        raise ValueError(f"--show-pruning {path!r}: there is no folder {folder!r}")


def image_inputs(images: list[Image.Image], image_processor, model, settings=None) -> dict:
    """The arguments of `generate` that carry the images; settings: in place of those in use."""
    pixels = process_images(images, image_processor, settings or model.image_settings)
    place = {"device": model.device, "dtype": model.dtype}
    pixels = [p.to(**place) for p in pixels] if isinstance(pixels, list) else pixels.to(**place)
    return {"images": pixels, "image_sizes": [image.size for image in images]}


def sampling(args) -> dict:
    """The arguments of `generate` that choose tokens."""
    options = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    if args.temperature <= 0:
        return {"do_sample": False, **options}
    return {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, **options}


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
    check_image_count(len(names), query)
    images = load_images(names)
    tokenizer, model, image_processor, conv_mode = load_model(args)

    conversation = conv_templates[conv_mode].copy()
    conversation.append_message(conversation.roles[0], mark_images(query, model.config))
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")
    with trace_pruning(model) as trace:
        output = model.generate(
            ids[None].to(model.device),
            questions=[query.replace(IMAGE_PLACEHOLDER, "").strip()] * len(images),
            pad_token_id=tokenizer.pad_token_id,
            **image_inputs(images, image_processor, model),
            **sampling(args),
        )
    text = tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()
    if args.show_pruning:
        asked = query.replace(IMAGE_PLACEHOLDER, "...")
        picture = show_pruning(images, trace, ids, model, f"Question: {asked} Answer: {text}")
        picture.save(args.show_pruning)
    return text


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
