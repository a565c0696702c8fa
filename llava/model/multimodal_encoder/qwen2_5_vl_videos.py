"""Videos for Qwen2.5-VL: frames in pairs, each of which the tower sees like an image.

What is known of them: a prompt holds all tokens of a video in one run, and positions in time follow
from how long a pair of frames lasts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

#: what the public chat helper allows the frames of one video to have together: a frame has fewer
#: pixels in a long one
TOTAL_PIXELS = int(128000 * 28 * 28 * 0.9)
#: frames a second that a list of frames is taken for where nobody says it
FPS = 2.0


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
    grids = video_grid_thw.tolist()
    counts = [pairs * rows * columns for pairs, rows, columns in grids]
    if pixel_values.ndim != 2 or sum(counts) != len(pixel_values):
        raise ValueError(
            f"pixel_values_videos {tuple(pixel_values.shape)} do not fit video_grid_thw {grids}, "
            f"which is about {sum(counts)} patches"
        )
    lasting = [1.0] * len(grids) if seconds is None else [float(own) for own in seconds]
    if len(lasting) != len(grids):
        raise ValueError(
            f"second_per_grid_ts has {len(lasting)} numbers for {len(grids)} videos: give one each"
        )
    return [
        Video(part.view(pairs, rows // merge, columns // merge, merge * merge, -1), own)
        for part, (pairs, rows, columns), own in zip(
            pixel_values.split(counts), grids, lasting, strict=True
        )
    ]
