"""Pictures to what the tower of Qwen2.5-VL reads: patches of a size that keeps the proportions.

A picture is resized to whole blocks of 2 x 2 patches; its tensor (h, w, 4, values of a patch) says
by its shape how many rows and columns of blocks it has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from ...image_io import to_rgb

#: longest side over shortest that is accepted
MAX_RATIO = 200
VIDEOS = (
    "videos are not supported with Qwen2.5-VL here: give single frames as images, one <image> each"
)


class Qwen2_5_VLImageProcessor:
    """Prepares pictures; the settings are those of preprocessor_config.json.

    min_pixels, max_pixels: bounds of the area that a picture is resized to. A token stands for
        28 x 28 pixels, so `max_pixels=1280 * 28 * 28` is at most 1280 tokens; assign to change them
    """

    model_input_names = ["pixel_values", "image_grid_thw"]

    def __init__(
        self,
        min_pixels: int = 56 * 56,
        max_pixels: int = 16384 * 28 * 28,
        patch_size: int = 14,
        temporal_patch_size: int = 2,
        merge_size: int = 2,
        image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
    ):
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.patch_size, self.temporal_patch_size = patch_size, temporal_patch_size
        self.merge_size = merge_size
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)

    def __call__(self, images=None, return_tensors: str = "pt", videos=None) -> BatchFeature:
        return self.preprocess(images, return_tensors, videos)

    def preprocess(self, images, return_tensors: str = "pt", videos=None) -> BatchFeature:
        """The same in the form of transformers: `pixel_values` (patches, values), those of all
        pictures one behind the other, and `image_grid_thw` (pictures, 3)."""
        if videos is not None:
            raise ValueError(VIDEOS)
        parts = self.process_images(images if isinstance(images, (list, tuple)) else [images])
        grids = [[1, *(side * self.merge_size for side in part.shape[:2])] for part in parts]
        return BatchFeature(
            {
                "pixel_values": torch.cat([part.flatten(0, 2) for part in parts]),
                "image_grid_thw": torch.tensor(grids),
            },
            tensor_type=return_tensors,
        )

    def process_images(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """(h, w, 4, values) float32 of every picture; transparent parts become white."""
        block = (self.patch_size * self.merge_size) ** 2
        if not 0 < self.min_pixels <= self.max_pixels or self.max_pixels < block:
            raise ValueError(
                f"min_pixels {self.min_pixels} and max_pixels {self.max_pixels} leave no size for "
                f"an image: a token stands for {block} pixels"
            )
        return [self._patches(image) for image in images]

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) tokens that a picture of this (width, height) becomes.

        Raises ValueError where it is too small or too thin, see `smart_resize`.
        """
        width, height = size
        block = self.patch_size * self.merge_size
        height, width = smart_resize(height, width, block, self.min_pixels, self.max_pixels)
        return height // block, width // block

    def split(self, pixel_values: Tensor, image_grid_thw: Tensor) -> list[Tensor]:
        """What `process_images` gives, from what `preprocess` gives."""
        return split_images(pixel_values, image_grid_thw, self.merge_size)

    def _patches(self, image: Image.Image) -> Tensor:
        if not isinstance(image, Image.Image):
            video = isinstance(image, (list, tuple))
            what = VIDEOS if video else f"an image must be a PIL image, not {type(image).__name__}"
            raise ValueError(what)
        image = to_rgb(image)
        h, w = self.grid(image.size)
        patch, merge = self.patch_size, self.merge_size
        size = w * patch * merge, h * patch * merge
        levels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        # (h, inner row, y, w, inner column, x, channel) -> (h, w, row, column, channel, y, x)
        levels = levels.reshape(h, merge, patch, w, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        values = np.empty((h, w, merge, merge, 3, self.temporal_patch_size, patch, patch), "f4")
        for channel, table in enumerate(self._tables()):
            values[:, :, :, :, channel] = table[levels[:, :, :, :, channel]][:, :, :, :, None]
        return torch.from_numpy(values.reshape(h, w, merge * merge, -1))

    def _tables(self) -> np.ndarray:
        """(3, 256) normalised value of every level of every channel."""
        share = (np.arange(256) * (1 / 255)).astype(np.float32)
        mean, std = (np.array(x, np.float32)[:, None] for x in (self.image_mean, self.image_std))
        return (share - mean) / std


def split_images(pixel_values: Tensor, image_grid_thw: Tensor, merge: int = 2) -> list[Tensor]:
    """Tensors (h, w, 4, values), one per image, of patches (n, values) and their grids (images, 3)
    as the processor of transformers gives them. Raises ValueError when the two do not fit."""
    grids = image_grid_thw.tolist()
    if odd := [grid for grid in grids if grid[0] != 1]:
        raise ValueError(f"image_grid_thw holds {odd[0]}, {odd[0][0]} pairs of frames: {VIDEOS}")
    counts = [rows * columns for _, rows, columns in grids]
    if pixel_values.ndim != 2 or sum(counts) != len(pixel_values):
        raise ValueError(
            f"pixel_values {tuple(pixel_values.shape)} do not fit image_grid_thw {grids}, which "
            f"is about {sum(counts)} patches"
        )
    return [
        part.view(rows // merge, columns // merge, merge * merge, -1)
        for part, (_, rows, columns) in zip(pixel_values.split(counts), grids, strict=True)
    ]


def pixels_of_blocks(blocks: Tensor, merge: int, patch: int) -> Tensor:
    """(3, height, width) of an image in blocks (h, w, M, values)."""
    frames = blocks.unflatten(3, (3, -1, patch, patch)).unflatten(2, (merge, merge))
    h, w = blocks.shape[:2]
    # (h, w, row, column, channel, y, x) of the first frame, which the others repeat
    pixels = frames[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6)
    return pixels.reshape(3, h * merge * patch, w * merge * patch)


def blocks_of_pixels(pixels: Tensor, merge: int, patch: int, frames: int = 2) -> Tensor:
    """The way back."""
    h, w = (side // (merge * patch) for side in pixels.shape[1:])
    blocks = pixels.reshape(3, h, merge, patch, w, merge, patch).permute(1, 4, 2, 5, 0, 3, 6)
    blocks = blocks[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, frames, -1, -1)
    return blocks.reshape(h, w, merge * merge, -1)


def smart_resize(
    height: int, width: int, factor: int = 28, min_pixels: int = 56 * 56, max_pixels: int = 12845056
) -> tuple[int, int]:
    """(height, width), multiples of `factor` near the given ones, with an area between the bounds.

    Raises ValueError for a side shorter than `factor`, or longer than `MAX_RATIO` times the other.
    """
    if min(height, width) < factor:
        raise ValueError(
            f"an image of {width} x {height} pixels is too small: each side needs {factor} pixels"
        )
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(
            f"an image of {width} x {height} pixels is too thin: the longer side may be at most "
            f"{MAX_RATIO} times the shorter"
        )
    near = [round(side / factor) * factor for side in (height, width)]
    if math.prod(near) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        near = [math.floor(side / shrink / factor) * factor for side in (height, width)]
    elif math.prod(near) < min_pixels:
        enlarge = math.sqrt(min_pixels / (height * width))
        near = [math.ceil(side * enlarge / factor) * factor for side in (height, width)]
    return max(near[0], factor), max(near[1], factor)
