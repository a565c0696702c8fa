"""Asks a model one question about one or several images or videos, and prints its answer.

    python -m llava.eval.run_llava --model-path liuhaotian/llava-v1.5-7b --image-file view.jpg \
        --query "What is shown here?" --pruning-method vispruner --show-pruning kept.png

Without a model the playground's is used, without an image one of its benchmark. Videos
(`--video-file clip.gif`, or a folder of frames) are for models that take them, such as Qwen2.5-VL.
"""

from __future__ import annotations

import argparse
import os
import sys
from types import SimpleNamespace

import torch
from PIL import Image

from llava.constants import (
    DEFAULT_IMAGE_TOKEN,
    DEFAULT_VIDEO_TOKEN,
    IMAGE_PLACEHOLDER,
    VIDEO_PLACEHOLDER,
)
from llava.engine.options import add_engine_args
from llava.errors import errors_as_messages
from llava.front_end import in_order
from llava.mm_utils import load_image
from llava.model_args import (
    add_asking_args,
    add_length_arg,
    add_sampling_args,
    load_front_end,
    sampling,
)
from llava.playground import default_image
from llava.program_parser import ProgramParser
from llava.pruning import trace_pruning
from llava.pruning.cli import pairs_in
from llava.pruning.picture import show_pruning
from llava.video_io import load_video

DEFAULT_QUERY = "What color is the ring?\nAnswer the question using a single word or phrase."
PICTURE_TYPES = (".png", ".jpg", ".webp")


def image_parser(args) -> list[str]:
    """The files and URLs in `args.image_file`, which `args.sep` stands between."""
    return args.image_file.split(args.sep)


def load_images(image_files: list[str]) -> list[Image.Image]:
    """RGB images from files and URLs, upright and on white."""
    return [load_image(name) for name in image_files]


def build_parser() -> argparse.ArgumentParser:
    parser = ProgramParser(__doc__)
    parser.add_argument("--image-file", help="file or URL; several with --sep between them")
    parser.add_argument("--video-file", help="file, or folder of frames; several like image files")
    parser.add_argument("--fps", type=float, help="frames a second to take of a video (default: 2)")
    parser.add_argument(
        "--num-frames", type=int, help="the most frames to take of a video (default: 768)"
    )
    places = f"the question; {IMAGE_PLACEHOLDER} and {VIDEO_PLACEHOLDER} in it say where these go"
    parser.add_argument("--query", help=places)
    parser.add_argument("--sep", default=",", help="what stands between files (default: a comma)")
    add_sampling_args(parser)
    add_length_arg(parser, 512)
    parser.add_argument(
        "--show-pruning", metavar="FILE.png", help="write a picture of the patches that were kept"
    )
    add_asking_args(parser)
    add_engine_args(parser)
    return parser


def with_marks(query: str, num_images: int, num_videos: int = 0) -> str:
    """The query with a token for every placeholder of an image or a video, or, if it has none, one
    for each kind in front.

    Raises ValueError unless it has a place for every image and video.
    """
    marked = query.replace(IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN)
    marked = marked.replace(VIDEO_PLACEHOLDER, DEFAULT_VIDEO_TOKEN)
    if IMAGE_PLACEHOLDER not in query and VIDEO_PLACEHOLDER not in query:
        kinds = ((DEFAULT_IMAGE_TOKEN, num_images), (DEFAULT_VIDEO_TOKEN, num_videos))
        marked = "".join(f"{mark}\n" for mark, count in kinds if count) + query
    for placeholder, mark, count in (
        (IMAGE_PLACEHOLDER, DEFAULT_IMAGE_TOKEN, num_images),
        (VIDEO_PLACEHOLDER, DEFAULT_VIDEO_TOKEN, num_videos),
    ):
        places = marked.count(mark) if count or placeholder in query else 0
        if places != count:
            kind = "images" if mark == DEFAULT_IMAGE_TOKEN else "videos"
            raise ValueError(
                f"{count} {kind}, but the query has places for {places}: write {placeholder} into "
                "it once for each"
            )
    return marked


def check_file_names(args) -> None:
    """Raises ValueError on a name without a character, such as a variable of the shell that is not
    set: the question would be asked without its image."""
    if args.sep == "":
        raise ValueError("--sep is empty: what stands between the files?")
    for option, text in (("--image-file", args.image_file), ("--video-file", args.video_file)):
        names = [] if text is None else text.split(args.sep)
        if not all(name.strip() for name in names):
            where = "is empty" if len(names) == 1 else f"{text!r} has an empty name in it"
            raise ValueError(f"{option} {where}: name a file, or leave the option out")


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
    check_file_names(args)
    given = args.image_file is not None or args.video_file is not None
    if args.query is None and given:
        raise ValueError("--query is missing: what should be asked about the image?")
    if args.query is not None and not args.query.strip():
        raise ValueError("--query is empty: what should be asked?")
    if args.video_file is None and (args.fps is not None or args.num_frames is not None):
        raise ValueError("--fps and --num-frames are about videos: there is no --video-file")
    check_picture_name(args.show_pruning)
    query = DEFAULT_QUERY if args.query is None else args.query
    names = image_parser(args) if args.image_file else [] if given else [default_image()]
    if not given:
        print(f"image: {names[0]}; question: {query.splitlines()[0]}", file=sys.stderr)
    videos = args.video_file.split(args.sep) if args.video_file else []
    text = with_marks(query, len(names), len(videos))
    images = load_images(names)
    clips = [load_video(name, args.fps, args.num_frames) for name in videos]
    for name, clip in zip(videos, clips, strict=True):
        taken = f"{len(clip.frames)} frames, {clip.fps:.3g} a second"
        print(f"video: {name}, {taken}", file=sys.stderr)
    front = load_front_end(args)

    ids = front.encode(front.prompt(text, len(images), len(clips)))
    pictures = in_order(text, list(map(front.picture, images)), list(map(front.video, clips)))
    asked = query.replace(IMAGE_PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "").strip()
    with trace_pruning(front.model) as trace:
        inputs = front.inputs([ids], [pictures], [asked])
        output = front.model.generate(**inputs, **sampling(args))
    found = front.decode(output)[0]
    if args.show_pruning:
        asked = query.replace(IMAGE_PLACEHOLDER, "...").replace(VIDEO_PLACEHOLDER, "...")
        caption = f"Question: {asked} Answer: {found}"
        shown = in_order(text, images, [clip.frames for clip in clips])
        show_pruning(shown, trace, ids, front.model, caption).save(args.show_pruning)
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
