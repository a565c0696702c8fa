"""Masks of kept tokens beside an answers file: one picture per image, one pixel per token."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

#: endings of the folders: tokens that were kept, and those inside the boxes
KEPT, REFERENCE = "_masks", "_ref_masks"


def mask_path(answers: str, number: int, image: int = 0, kind: str = KEPT) -> str:
    """Where the mask of an image lies; number: place of the question in the file, from 0."""
    name = f"{number}.png" if image == 0 else f"{number}_{image}.png"
    return os.path.join(f"{os.path.splitext(answers)[0]}{kind}", name)


def write_mask(mask: np.ndarray, path: str) -> None:
    """mask: (rows, columns) bool; the picture appears whole."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.{os.getpid()}"
    Image.fromarray(mask).save(partial, format="PNG")
    os.replace(partial, path)


def read_mask(path: str) -> np.ndarray | None:
    """(rows, columns) bool; None where there is none. ValueError when it is no picture."""
    if not os.path.isfile(path):
        return None
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("L")) > 127
    except OSError as error:
        raise ValueError(f"{path} is no mask: {error}") from error
