"""Boxes on a picture as cells of a grid over it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
