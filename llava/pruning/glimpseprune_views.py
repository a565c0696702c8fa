"""The grids of patches that a batch of prompts shows: where their patches stand, and which of them
the predictor of GlimpsePrune lets see one another.

A view is what it judges at a time: a crop of an image, which is all of it unless it was cut into
tiles. The patches of all views are one sequence, prompt by prompt, image by image, crop by crop,
row by row. All of it follows from numbers of the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..blocks import rope_of
from ..segments import Segments, segments_of, windows_of
from .ops import on_device
from .tokens import GRID

Grid = tuple[int, int]
#: the number of an image that says how many crops of it are judged
CROPS = "crops"


@dataclass(frozen=True)
class Views:
    """
    grids:    (h, w) of every view
    place:    (n,) place of every patch among the B * S tokens of the prompts; B * S where it is not
              there, because it was cut off as padding
    complete: whether all are there
    shape:    (B, S)
    """

    grids: tuple[Grid, ...]
    place: Tensor
    complete: bool
    shape: tuple[int, int]

    @classmethod
    def of(
        cls, image: Tensor, patch: Tensor, numbers: Mapping[str, Sequence[Sequence[int]]], counts
    ) -> Views:
        """From `visual_index` and `patch_index` (B, S), `image_extras` and `counts` as in `Prompt`
        or `Prefill`, `CROPS` among the numbers."""
        images = shapes_of(numbers)
        grids, starts, total = [], [], 0
        for row in images:
            sizes = [h * w * crops for (h, w), crops in row]
            starts.append([total + size for size in accumulate([0, *sizes])])
            grids += [grid for grid, crops in row for _ in range(crops)]
            total = starts[-1][-1]
        most = max(map(len, starts))
        starts = [[*row, *[0] * (most - len(row))] for row in starts]
        own = on_device(starts, patch.device).gather(1, image.clamp(min=0)) + patch
        slot = torch.where(patch >= 0, own, total).flatten()
        count = patch.numel()
        table = torch.full((total + 1,), count, device=patch.device)
        table.scatter_(0, slot, torch.arange(count, device=patch.device))
        whole = counts is not None and whole_grids(images, counts.images)
        batch, size = patch.shape
        return cls(tuple(grids), table[:total], whole, (batch, size))

    def gather(self, x: Tensor) -> Tensor:
        """(n, ...) the values of the patches, from those of all tokens (B, S, ...); zeros where
        there is no patch."""
        x = x.flatten(0, 1)
        if self.complete:
            return x[self.place]
        found = x[self.place.clamp(max=len(x) - 1)]
        return found.masked_fill(~self.real.view(-1, *(1,) * (x.ndim - 1)), 0)

    def scatter(self, values: Tensor) -> Tensor:
        """(B, S) the way back, from one value for each patch; zeros on other tokens."""
        batch, size = self.shape
        found = values.new_zeros(batch * size + 1)  # the last one is for no token
        return found.scatter(0, self.place, values)[:-1].view(batch, size)

    @property
    def real(self) -> Tensor:
        """(n,) whether a patch is there."""
        return self.place < self.shape[0] * self.shape[1]


def shapes_of(
    numbers: Mapping[str, Sequence[Sequence[int]]],
) -> list[list[tuple[Grid, int]]]:
    """((h, w) of a crop, crops) of every image of every row, from `image_extras`."""
    rows = zip(*(numbers[name] for name in (*GRID, CROPS)), strict=True)
    return [[((h, w), crops) for h, w, crops in zip(*row, strict=True)] for row in rows]


def whole_grids(images, counts: Sequence[Sequence[int]] | None) -> bool:
    """Whether images of these `shapes_of`, with so many tokens each, have one for every patch.
    Those of several crops may have lost some and got newlines for them."""
    if counts is None:
        return False
    pairs = (zip(*row, strict=False) for row in zip(images, counts, strict=True))
    return all(
        crops == 0 or crops == 1 and h * w == n for row in pairs for ((h, w), crops), n in row
    )


def neighbours(grids: Sequence[Grid], side: int | None, device: torch.device) -> Segments:
    """Which patches see one another: those of a view, or, with `side`, of its windows of so many
    rows and columns."""
    sizes = {h * w for h, w in grids}
    if side is None and len(sizes) == 1:
        return Segments(None, None, [(len(grids), sizes.pop())])
    if side is None:
        size = torch.tensor([h * w for h, w in grids])
        owner = torch.arange(len(grids)).repeat_interleave(size)
        return segments_of(size[owner], owner).to(device)
    owners, start = [], 0
    for h, w in grids:
        owners.append(windows_of(h, w, side) + start)
        start = int(owners[-1][-1]) + 1
    owner = torch.cat(owners)
    return segments_of(owner.bincount()[owner], owner).to(device)


def grid_angles(grids: Sequence[Grid], width: int, device) -> tuple[Tensor, Tensor]:
    """fp32 `rope_of` (n, 1, width) of 2D RoPE for all patches: half of the angles turn with the
    row, half with the column, both counted in the view."""
    places = [torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2) for h, w in grids]
    place = torch.cat(places).to(device, non_blocking=True)
    even = torch.arange(width // 4, device=device, dtype=torch.float32)
    frequency = 10000.0 ** (-4 * even / width)
    return rope_of((place[:, :, None] * frequency).flatten(1)[:, None], torch.float32)
