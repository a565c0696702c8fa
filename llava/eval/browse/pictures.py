"""The picture of a question with its boxes and the tokens that were kept."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageDraw

from llava.eval.answering.questions import Question, load_image
from llava.eval.browse.runs import Run
from llava.eval.files.mask_files import mask_path, read_mask

GREEN, RED = (0, 255, 0), (255, 40, 40)
ALPHA = 0.4  # of the colour on kept tokens
LONGER_SIDE = 900  # pixels that a picture has at most


def inside(folder: str, name: str) -> str:
    """The path of a file below a folder. Raises ValueError when it lies elsewhere."""
    folder = os.path.realpath(folder)
    path = os.path.realpath(os.path.join(folder, name))
    if os.path.commonpath([folder, path]) != folder:
        raise ValueError(f"{name} lies outside of the image folder {folder}, and is not shown")
    return path


def open_image(question: Question, image: int, folder: str) -> Image.Image:
    """One picture of a question in RGB, of its own size."""
    name = question.images[image]
    if not question.base64:
        inside(folder, name)
    return load_image(question, name, folder)


def draw(question: Question, run: Run, place: int, boxes: bool, mask: bool) -> list[Image.Image]:
    """The pictures of a question; place: its line in the file of `run`.

    boxes: outline those that are known; mask: colour what was kept, where that was written down
    """
    pictures = []
    for number in range(len(question.images)):
        picture = open_image(question, number, run.source.images)
        if mask and (found := read_mask(mask_path(run.path, place, number))):
            picture = colored(picture, *found)
        if boxes and question.boxes:
            line = max(2, max(picture.size) // 200)
            for box in question.boxes[number]:
                ImageDraw.Draw(picture).rectangle(tuple(box), outline=RED, width=line)
        picture.thumbnail((LONGER_SIDE, LONGER_SIDE))
        pictures.append(picture)
    return pictures


def colored(picture: Image.Image, mask: np.ndarray, frames: list) -> Image.Image:
    """A picture with green on the cells of a mask; see `mask_files`."""
    frames = frames or [(0, 0, *picture.size)]
    whole = Image.new("L", picture.size)
    # The overview comes first; where there are tiles, theirs is the finer view.
    for part, frame in zip(np.split(mask, len(frames)), frames, strict=True):
        left, top, width, height = (round(number) for number in frame)
        cells = Image.fromarray(part).convert("L").resize((width, height), Image.Resampling.NEAREST)
        whole.paste(255, (left, top), cells)
    green = Image.blend(picture, Image.new("RGB", picture.size, GREEN), ALPHA)
    return Image.composite(green, picture, whole)
