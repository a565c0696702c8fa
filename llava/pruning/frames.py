"""What part of an image every crop shows, and which patches boxes on the image cover."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.image_settings import ImageSettings
from llava.mm_utils import get_anyres_image_grid_shape
from llava.pruning.cells import boxes_to_cells

#: (left, top, width, height) of a crop in pixels of the image, which it may exceed
Frame = tuple[float, float, float, float]


def crop_frames(size: tuple[int, int], settings: ImageSettings, side: int) -> list[Frame]:
    """What every crop shows of an image of (width, height) pixels, in the order of
    `process_images`; what exceeds the image is padding.

    side: pixels of a crop
    """
    width, height = size
    mode = settings.image_aspect_ratio
    if mode == "anyres":
        pinpoints, selection = settings.image_grid_pinpoints, settings.anyres_selection
        across, down = get_anyres_image_grid_shape(size, pinpoints, side, selection)
        scale = max(width / (across * side), height / (down * side))  # image pixels per tile pixel
        tile = side * scale
        left, top = (width - across * tile) / 2, (height - down * tile) / 2
        tiles = [
            (left + column * tile, top + row * tile, tile, tile)
            for row in range(down)
            for column in range(across)
        ]
        return [(0, 0, width, height), *tiles]
    if mode == "pad":
        square = max(size)
        return [(-((square - width) // 2), -((square - height) // 2), square, square)]
    square = min(size)  # cut out of the middle
    return [((width - square) / 2, (height - square) / 2, square, square)]


def image_frames(size: tuple[int, int], model) -> list[Frame]:
    """As `crop_frames`, for the method in use; where images have grids of their own, the one crop
    is the image."""
    tower = model.get_vision_tower()
    if tower.grid is None:
        return [(0, 0, *size)]
    return crop_frames(size, model.image_settings, tower.image_size)


def shares_of(boxes: Sequence[Sequence[float]], frame: Frame) -> list[list[float]]:
    """Boxes (left, top, right, bottom) in pixels of an image as shares of a crop, cut at its
    borders; those beside it are left out."""
    left, top, width, height = frame
    found = []
    for x1, y1, x2, y2 in boxes:
        box = (x1 - left) / width, (y1 - top) / height, (x2 - left) / width, (y2 - top) / height
        if box[2] >= 0 and box[3] >= 0 and box[0] < 1 and box[1] < 1:
            found.append([min(max(edge, 0.0), 1.0) for edge in box])
    return found


def covered(
    boxes: Sequence[Sequence[float]], frames: Sequence[Frame], grid: tuple[int, int]
) -> Tensor:
    """(crops, h, w) True on the patches that boxes in pixels of an image lie on."""
    return torch.stack([boxes_to_cells(shares_of(boxes, frame), grid) for frame in frames])
