"""Videos for Qwen2.5-VL: frames in pairs, each of which the tower sees like an image.

What is known of them: a prompt holds all tokens of a video in one run, and positions in time follow
from how long a pair of frames lasts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: what the public chat helper allows the frames of one video to have together: a frame has fewer
#: pixels in a long one
TOTAL_PIXELS = int(128000 * 28 * 28 * 0.9)


@dataclass(eq=False)
class Video:
    """A video ready for the tower.

    pixels:  (t, h, w, M, values): every pair of frames as an image of the same grid
    seconds: how long a pair of frames lasts
    """

    pixels: Tensor
    seconds: float

    def __post_init__(self):
        if not 0 < self.seconds < float("inf"):
            raise ValueError(f"a pair of frames cannot last {self.seconds} seconds")

    def __len__(self) -> int:
        """Pairs of frames."""
        return len(self.pixels)

    def to(self, *args, **kwargs) -> Video:
        return replace(self, pixels=self.pixels.to(*args, **kwargs))

    @property
    def shape(self) -> torch.Size:
        return self.pixels.shape

    def times(self, tokens_per_second: float) -> list[int]:
        """Position in time of every pair of frames, 0 for the first. In the precision and the order
        of transformers, whose rounding decides where it comes close to a whole number."""
        return (torch.arange(len(self)) * self.seconds * tokens_per_second).long().tolist()


def frame_limits(min_pixels: int, max_pixels: int, total: int, frames: int) -> tuple[int, float]:
    """Bounds of the area of a frame, of `frames` in a video that may have `total` together."""
    return min_pixels, max(min(max_pixels, total / frames * 2), int(min_pixels * 1.05))


def split_videos(
    pixel_values: Tensor, video_grid_thw: Tensor, seconds: Sequence[float] | Tensor | None, merge=2
) -> list[Video]:
    """The videos in patches (n, values) and grids (videos, 3), as transformers has them.

    seconds: how long a pair of frames lasts in each; None: 1, as there
    Raises ValueError when they do not fit.
    """
    names = "pixel_values_videos", "video_grid_thw"
    parts = split_patches(pixel_values, video_grid_thw, merge, names)
    lasting = [1.0] * len(parts) if seconds is None else [float(own) for own in seconds]
    if len(lasting) != len(parts):
        raise ValueError(
            f"second_per_grid_ts has {len(lasting)} numbers for {len(parts)} videos: give one each"
        )
    return [Video(*pair) for pair in zip(parts, lasting, strict=True)]


def split_patches(
    pixels: Tensor, grids: Tensor, merge: int, names: tuple[str, str]
) -> list[Tensor]:
    """(t, h, w, M, values) of every image or video, of patches (n, values) and grids (images, 3) as
    the processor of transformers gives them.

    names: what the two are called there
    Raises ValueError when they do not fit.
    """
    shape = tuple(torch.as_tensor(grids).shape)
    if len(shape) != 2 or shape[1] != 3:
        raise ValueError(f"{names[1]} must be (images or videos, 3), not {shape}")
    sizes = torch.as_tensor(grids).tolist()
    if odd := [grid for grid in sizes if min(grid) < 1 or grid[1] % merge or grid[2] % merge]:
        raise ValueError(
            f"{names[1]} holds {odd[0]}: rows and columns of patches must be multiples of {merge}"
        )
    counts = [math.prod(size) for size in sizes]
    if pixels.ndim != 2 or sum(counts) != len(pixels):
        raise ValueError(
            f"{names[0]} {tuple(pixels.shape)} do not fit {names[1]} {sizes}, which is "
            f"about {sum(counts)} patches"
        )
    return [
        part.view(pairs, rows // merge, columns // merge, merge * merge, -1)
        for part, (pairs, rows, columns) in zip(pixels.split(counts), sizes, strict=True)
    ]
