"""Boxes and masks on a picture as cells of a grid over it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

#: brightness above which a pixel of a mask counts
HALF = 127


def boxes_to_cells(boxes: Sequence[Sequence[float]], grid: tuple[int, int]) -> Tensor:
    """(h, w) True where a box lies; boxes are (left, top, right, bottom), shares of the picture.

    Both ends count, so that even a box without area marks a cell.
    """
    rows, columns = grid
    cells = torch.zeros(grid, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        down = slice(int(top * rows), min(int(bottom * rows), rows - 1) + 1)
        across = slice(int(left * columns), min(int(right * columns), columns - 1) + 1)
        cells[down, across] = True
    return cells


def mask_to_cells(mask: Image.Image | Tensor | np.ndarray, grid: tuple[int, int]) -> Tensor:
    """(h, w) True where a mask is: True or False for each cell, or a picture that is bright there,
    of which the nearest pixel counts. Raises ValueError for anything else."""
    if isinstance(mask, Image.Image):
        small = mask.convert("L").resize((grid[1], grid[0]), Image.Resampling.NEAREST)
        return torch.from_numpy(np.asarray(small) > HALF)
    cells = torch.as_tensor(mask).cpu()
    if tuple(cells.shape) != tuple(grid) or cells.is_floating_point():
        raise ValueError(
            f"a mask is {tuple(cells.shape)} of {cells.dtype}, but its image has {grid[0]} x "
            f"{grid[1]} tokens: give True or False for each, or a picture"
        )
    return cells.bool()
