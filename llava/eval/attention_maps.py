"""Draws what every token of an answer attends to on the images, in one decoder layer.

    python -m llava.eval.attention_maps --image-file view.jpg --query "What is shown here?" \\
        --layer 15 --output-dir maps [--head 3] [--pruning-method ...]

Writes a picture for each token, `overview.png` with all of them and `attention.json` with the share
of the attention that each image gets. One row of attention is computed per token, whatever the
backend. Where a method dropped a token, its patch stays grey. Without a model the playground's is
used, without an image one of its benchmark.
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from llava.constants import IMAGE_PLACEHOLDER
from llava.errors import errors_as_messages
from llava.eval.files.writing import write_json
from llava.eval.run_llava import DEFAULT_QUERY, image_parser, load_images, with_marks
from llava.front_end import FrontEnd
from llava.mm_utils import BROKEN
from llava.model_args import add_asking_args, add_length_arg, load_front_end
from llava.playground import default_image
from llava.program_parser import ProgramParser
from llava.pruning import trace_pruning
from llava.pruning.picture import side_by_side, token_boxes

SIDE = 448  # pixels of the longer side of a picture
HEAT = 0.6  # share of the colour on a patch
COLUMNS = 5  # of the overview


@dataclass(frozen=True)
class TokenMaps:
    """What one token of an answer follows from.

    text:   the token, with the space in front of it; of several that are one character, the last
            one has it
    shares: per image, the share of all attention that its tokens get
    maps:   per image (patches,) the attention that each patch gets, NaN where it is not there
    grids:  per image the (h, w) patches of each crop, which a method may have made smaller
    """

    text: str
    shares: list[float]
    maps: list[np.ndarray]
    grids: list[tuple[int, int]]


@torch.inference_mode()
def attention_maps(
    front: FrontEnd,
    images: list[Image.Image],
    query: str,
    layer: int,
    head: int | None = None,
    max_new_tokens: int = 64,
) -> list[TokenMaps]:
    """Maps of every token of the answer to a query (with a mark for each image or none).

    layer, head: of the decoder, from 0; a negative layer counts from the last. head None: the mean
    Raises ValueError for a layer or head that it does not have.
    """
    model, heads = front.model, front.model.config.num_attention_heads
    if head is not None and not 0 <= head < heads:
        raise ValueError(
            f"--head {head} is not one of the {heads} attention heads, 0 to {heads - 1}"
        )
    ids = front.encode(front.prompt(with_marks(query, len(images))))
    pictures = [front.picture(image) for image in images]
    asked = query.replace(IMAGE_PLACEHOLDER, "").strip()
    with trace_pruning(model, attention=[layer]) as trace:
        inputs = front.inputs([ids], [pictures], [asked])
        output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[0]
    rows = trace.answer_image_attention(layer % model.config.num_hidden_layers)
    alive = alive_positions(trace, layer % model.config.num_hidden_layers)
    found = []
    for text, own in zip(token_texts(front.tokenizer, output.tolist()), rows, strict=False):
        values = [row.mean(dim=0) if head is None else row[head] for row in own]
        places = zip(values, trace.visual_positions, alive, images, trace.grids, strict=True)
        maps = [
            per_patch(value, patches, there, sum(map(len, token_boxes(image.size, model, grid))))
            for value, patches, there, image, grid in places
        ]
        shares = [round(float(value.sum()), 6) for value in values]
        found.append(TokenMaps(text, shares, maps, trace.grids))
    return found


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text of an answer; tokenizers of Llama leave out the space of one
    that they decode alone."""
    texts, shown = [], ""
    for count, token in enumerate(ids, start=1):
        if token in tokenizer.all_special_ids:
            texts.append(tokenizer.convert_ids_to_tokens(token))
            continue
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        # Half of a character waits for the rest, unless that never comes.
        whole = count == len(ids) or not text.endswith(BROKEN)
        texts.append(text[len(shown) :] if whole else "")
        shown = text if whole else shown
    return texts


def alive_positions(trace, layer: int) -> list[Tensor]:
    """Per image of the one prompt, which of its tokens enter `layer`: bool, as its positions."""
    size = trace.position_ids.shape[1]
    alive = torch.ones(size, dtype=torch.bool)
    for cut in sorted(cut for cut in trace.decoder_keep if cut <= layer):
        kept = trace.decoder_keep[cut][0]
        alive = torch.zeros(size, dtype=torch.bool)
        alive[kept[kept >= 0]] = True
    owner = trace.visual_index[0]
    return [alive[owner == image] for image in range(int(owner.amax()) + 1)]


def per_patch(values: Tensor, patches: Tensor, alive: Tensor, count: int) -> np.ndarray:
    """(count,) values of an image's tokens at their patches, NaN elsewhere."""
    known = alive & (patches >= 0)
    found = np.full(count, np.nan, dtype=np.float32)
    found[patches[known].numpy()] = values[known].numpy()
    return found


def draw_map(image: Image.Image, values: np.ndarray, boxes: list[np.ndarray]) -> Image.Image:
    """The picture in grey, its patches coloured by their value from blue to red, the largest of the
    map being red; of an image in tiles, the tiles. Patches without a value stay grey."""
    scale = SIDE / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    grey = image.convert("L").convert("RGB").resize(size)
    heat, mask = Image.new("RGB", size), Image.new("L", size)
    start = 0 if len(boxes) == 1 else len(boxes[0])
    own = values[start:]
    top = np.nanmax(values) if np.isfinite(values).any() else 1.0
    draw, marks = ImageDraw.Draw(heat), ImageDraw.Draw(mask)
    for value, box in zip(own, np.concatenate(boxes)[start:] * scale, strict=True):
        if np.isfinite(value):
            hue = round(240 * (1 - float(value) / max(float(top), 1e-12)))
            draw.rectangle(tuple(box), f"hsv({hue}, 100%, 100%)")
            marks.rectangle(tuple(box), round(255 * HEAT))
    return Image.composite(heat, grey, mask)


def draw_token(own: TokenMaps, images: list[Image.Image], boxes: list, caption: str) -> Image.Image:
    """The maps of one token side by side, with its text below."""
    panels = [draw_map(*parts) for parts in zip(images, own.maps, boxes, strict=True)]
    shares = ", ".join(f"{100 * share:.1f} %" for share in own.shares)
    return side_by_side(panels, f"{own.text!r}: {shares} of its attention {caption}")


def overview(pictures: list[Image.Image]) -> Image.Image:
    """All pictures on one sheet, at half their size."""
    width = max(picture.width for picture in pictures) // 2
    height = max(picture.height for picture in pictures) // 2
    columns = min(COLUMNS, len(pictures))
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for number, picture in enumerate(pictures):
        small = picture.resize((picture.width // 2, picture.height // 2))
        sheet.paste(small, (number % columns * width, number // columns * height))
    return sheet


def build_parser() -> argparse.ArgumentParser:
    parser = ProgramParser(__doc__)
    parser.add_argument("--image-file", help="file or URL; several with --sep between them")
    parser.add_argument(
        "--query", help=f"the question; {IMAGE_PLACEHOLDER} in it says where an image goes"
    )
    parser.add_argument(
        "--sep", default=",", help="what stands between image files (default: a comma)"
    )
    parser.add_argument(
        "--layer", type=int, default=-1, help="decoder layer, counted from 0 (default: the last)"
    )
    parser.add_argument(
        "--head", type=int, help="attention head, counted from 0 (default: the mean of all)"
    )
    add_length_arg(parser, 64)
    parser.add_argument("--output-dir", required=True, help="folder of the pictures")
    add_asking_args(parser)
    return parser


@errors_as_messages()
def main() -> None:
    args = build_parser().parse_args()
    if args.query is None and args.image_file is not None:
        raise ValueError("--query is missing: what should be asked about the image?")
    query = DEFAULT_QUERY if args.query is None else args.query
    images = load_images(image_parser(args) if args.image_file else [default_image()])
    front = load_front_end(args)
    found = attention_maps(front, images, query, args.layer, args.head, args.max_new_tokens)
    os.makedirs(args.output_dir, exist_ok=True)
    model = front.model
    shown = zip(images, found[0].grids, strict=True)
    boxes = [token_boxes(image.size, model, grid) for image, grid in shown]
    where = f"(layer {args.layer % model.config.num_hidden_layers}"
    where += ", mean of its heads)" if args.head is None else f", head {args.head})"
    pictures = [draw_token(own, images, boxes, where) for own in found]
    for number, (own, picture) in enumerate(zip(found, pictures, strict=True)):
        name = re.sub(r"\W+", "", own.text) or "_"
        picture.save(os.path.join(args.output_dir, f"{number:03}_{name[:20]}.png"))
    overview(pictures).save(os.path.join(args.output_dir, "overview.png"))
    tokens = [{"token": own.text, "shares": own.shares} for own in found]
    write_json(tokens, os.path.join(args.output_dir, "attention.json"), indent=2)
    print("".join(own.text for own in found) + f" -> {args.output_dir}")


if __name__ == "__main__":
    main()
