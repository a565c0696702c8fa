"""Reference in place of GlimpsePrune's glimpse: boxes or masks that say which tokens stay."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from numbers import Real

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .cells import boxes_to_cells, mask_to_cells
from .glimpseprune_views import Grid


def check_boxes(boxes: Sequence) -> None:
    """Raises ValueError unless `boxes` are those of all images, or a list or None for each."""
    if not isinstance(boxes, (list, tuple)):
        raise ValueError(f"ref_boxes ({boxes!r}) must be a list of boxes, or one for each image")
    own = [boxes] if is_one_list(boxes) else [entry for entry in boxes if entry is not None]
    if odd := [entry for entry in own if not isinstance(entry, (list, tuple))]:
        raise ValueError(f"ref_boxes hold {odd[0]!r}: give a list of boxes, or one for each image")
    for box in chain(*own):
        if not is_box(box) or not all(0 <= edge <= 1 for edge in box):
            raise ValueError(
                f"ref_boxes hold {box!r}: a box is (left, top, right, bottom) as shares of the "
                "picture, from 0 to 1"
            )


def check_masks(masks: Sequence) -> None:
    """Raises ValueError unless `masks` are a mask or None for each image."""
    wanted = "a list with a mask (True or False, or a picture) for each image"
    if not isinstance(masks, (list, tuple, Tensor, np.ndarray)):
        raise ValueError(f"ref_masks ({masks!r}) must be {wanted}")
    kinds = (list, tuple, Tensor, np.ndarray, Image.Image, type(None))
    if odd := [mask for mask in masks if not isinstance(mask, kinds)]:
        raise ValueError(f"ref_masks hold {odd[0]!r}: give {wanted}")


def check_uncut(boxes: Sequence | None, masks: Sequence | None, crops: int) -> None:
    """Raises ValueError where references say places of a picture that was cut into `crops`: which
    part of it a crop shows is not known in the decoder."""
    marks = masks is not None or any(entry is not None and len(entry) for entry in boxes or ())
    if crops > 1 and marks:
        raise ValueError(
            f"{'ref_boxes' if masks is None else 'ref_masks'} are for images in one crop, this "
            f"model cuts one into {crops}"
        )


def is_box(value) -> bool:
    sequence = isinstance(value, (list, tuple)) and len(value) == 4
    return sequence and all(isinstance(edge, Real) for edge in value)


def is_one_list(boxes: Sequence) -> bool:
    """Whether boxes hold for all images, as they are not sorted by image."""
    return all(map(is_box, boxes))


def reference_cells(
    boxes: Sequence | None, masks: Sequence | None, images: list[list[tuple[Grid, int]]]
) -> Tensor:
    """(n,) True on the patches that stay, those of all views one behind the other.

    boxes, masks: the options `ref_boxes` and `ref_masks`
    images: ((h, w) of a crop, crops) of every image of every row; rows may be repeated (beams)
    """
    if masks is None and boxes is not None and is_one_list(boxes):
        return _joined([(boxes_to_cells(boxes, grid), n) for row in images for grid, n in row])
    given, name = (boxes or (), "ref_boxes") if masks is None else (masks, "ref_masks")
    total = sum(map(len, images))
    repeats = max(1, total // max(1, len(given)))
    if repeats * len(given) != total or images[::repeats] != images[repeats - 1 :: repeats]:
        raise ValueError(f"{name} are given for {len(given)} images, the prompts hold {total}")
    parts, left = [], iter(given)
    for row in images[::repeats]:
        cells = [(_cells(next(left), grid, masks is None), crops) for grid, crops in row]
        parts += cells * repeats
    return _joined(parts)


def _joined(parts: list[tuple[Tensor, int]]) -> Tensor:
    return torch.cat([cells.flatten().repeat(crops) for cells, crops in parts])


def _cells(given, grid: Grid, are_boxes: bool) -> Tensor:
    """Boxes, None (all of the image) or a mask."""
    if given is None:
        return torch.ones(grid, dtype=torch.bool)
    return boxes_to_cells(given, grid) if are_boxes else mask_to_cells(given, grid)
