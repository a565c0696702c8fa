"""Masks of kept tokens beside an answers file: one picture per image, one pixel per token.

Crops stand below each other. What each of them shows of its image is written into the picture, so
that it can be drawn on the image without the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

#: endings of the folders: tokens that were kept, and those inside the boxes
KEPT, REFERENCE = "_masks", "_ref_masks"
FRAMES = "frames"


def mask_path(answers: str, number: int, image: int = 0, kind: str = KEPT) -> str:
    """Where the mask of an image lies; number: place of the question in the file, from 0."""
    name = f"{number}.png" if image == 0 else f"{number}_{image}.png"
    return os.path.join(f"{os.path.splitext(answers)[0]}{kind}", name)


def write_mask(mask: np.ndarray, path: str, frames: Sequence[Sequence[float]] = ()) -> None:
    """mask: (rows, columns) bool; frames: (left, top, width, height) of each crop in pixels of the
    image. The picture appears whole."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    info = PngInfo()
    info.add_text(FRAMES, json.dumps([list(frame) for frame in frames]))
    partial = f"{path}.{os.getpid()}"
    Image.fromarray(mask).save(partial, format="PNG", pnginfo=info)
    os.replace(partial, path)


def read_mask(path: str) -> tuple[np.ndarray, list[list[float]]] | None:
    """The mask, (rows, columns) bool, and the frames of its crops, as `write_mask` takes them;
    without frames it is of the whole image. None where there is no file; ValueError where it is no
    picture."""
    if not os.path.isfile(path):
        return None
    try:
        with Image.open(path) as picture:
            frames = json.loads(picture.info.get(FRAMES, "[]"))
            return np.asarray(picture.convert("L")) > 127, frames
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no mask: {error}") from error
