"""Pictures to what the tower of Qwen2.5-VL reads: patches of a size that keeps the proportions.

A picture is resized to whole blocks of 2 x 2 patches; its tensor (h, w, 4, values of a patch) says
by its shape how many rows and columns of blocks it has. A patch holds two frames of a video; those
of a picture are the same.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from ...image_io import to_rgb
from ...pruning.cells import boxes_to_cells, mask_to_cells
from ...video_io import FPS
from .preprocessor_files import PREPROCESSOR
from .qwen2_5_vl_videos import TOTAL_PIXELS, Video, frame_limits, split_patches

#: what it says, and under which name transformers reads it
SAVED = (
    "min_pixels",
    "max_pixels",
    "patch_size",
    "temporal_patch_size",
    "merge_size",
    "image_mean",
    "image_std",
)
KNOWN_AS = {"image_processor_type": "Qwen2VLImageProcessor"}
#: longest side over shortest that is accepted
MAX_RATIO = 200


class Qwen2_5_VLImageProcessor:
    """Prepares pictures; the settings are those of preprocessor_config.json.

    min_pixels, max_pixels: bounds of the area that a picture is resized to. A token stands for
        28 x 28 pixels, so `max_pixels=1280 * 28 * 28` is at most 1280 tokens; assign to change them
    video_min_pixels, video_max_pixels: likewise, of every frame of a video, in which two frames
        have one set of tokens
    video_total_pixels: most pixels that the frames of a video have together, as far as
        `video_min_pixels` allows
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
        video_min_pixels: int = 128 * 28 * 28,
        video_max_pixels: int = 768 * 28 * 28,
        video_total_pixels: int = TOTAL_PIXELS,
    ):
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.patch_size, self.temporal_patch_size = patch_size, temporal_patch_size
        self.merge_size = merge_size
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        self.video_min_pixels, self.video_max_pixels = video_min_pixels, video_max_pixels
        self.video_total_pixels = video_total_pixels

    def __call__(
        self, images=None, return_tensors: str = "pt", videos=None, fps: float = FPS, **references
    ) -> BatchFeature:
        """`preprocess`, whose keywords it takes."""
        if "text" in references:
            raise ValueError(
                "text is not taken here, where pictures alone are prepared: use "
                "llava.front_end.FrontEnd, or the tokenizer on a prompt with one <|image_pad|> "
                "for every token of an image"
            )
        return self.preprocess(images, return_tensors, videos, fps, **references)

    def preprocess(
        self,
        images,
        return_tensors: str = "pt",
        videos=None,
        fps: float | Sequence[float] = FPS,
        normed_bboxes: Sequence | None = None,
        ref_image_masks: Sequence | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> BatchFeature:
        """The same in the form of transformers: `pixel_values` (patches, values), those of all
        pictures one behind the other, and `image_grid_thw` (pictures, 3); of videos, which are
        lists of frames, `pixel_values_videos`, `video_grid_thw` and `second_per_grid_ts`.

        fps: frames a second, of all videos or of each
        normed_bboxes, ref_image_masks: what is to be known of each picture: boxes (left, top,
            right, bottom) as shares of it, or a picture that is bright there; they become
            `ref_token_masks`, per picture a tensor (h, w) that is True on the tokens there (None
            where it is None)
        min_pixels, max_pixels: in place of the settings, for the pictures of this call
        """
        found: dict[str, Any] = {}
        masks = None
        images, videos = (None if is_empty(given) else given for given in (images, videos))
        if images is not None:
            own = self.bounded(min_pixels, max_pixels)
            parts = own.process_images(images if isinstance(images, (list, tuple)) else [images])
            found["pixel_values"] = torch.cat([part.flatten(0, 2) for part in parts])
            found["image_grid_thw"] = torch.tensor([self._grid_thw(part[None]) for part in parts])
            grids = [(part.shape[0], part.shape[1]) for part in parts]
            masks = token_masks(grids, normed_bboxes, ref_image_masks)
        if videos is not None:
            videos = [videos] if isinstance(videos[0], Image.Image) else videos
            rates = [fps] * len(videos) if isinstance(fps, (int, float)) else fps
            clips = [self.process_video(*pair) for pair in zip(videos, rates, strict=True)]
            found["pixel_values_videos"] = torch.cat([clip.pixels.flatten(0, 3) for clip in clips])
            found["video_grid_thw"] = torch.tensor([self._grid_thw(clip.pixels) for clip in clips])
            found["second_per_grid_ts"] = [clip.seconds for clip in clips]
        batch = BatchFeature(found, tensor_type=return_tensors)
        if masks is not None:
            batch["ref_token_masks"] = masks
        return batch

    def bounded(self, min_pixels: int | None, max_pixels: int | None) -> Qwen2_5_VLImageProcessor:
        """A copy with other bounds of the area of an image, those that are None as they are."""
        if min_pixels is None and max_pixels is None:
            return self
        other = copy(self)
        other.min_pixels = self.min_pixels if min_pixels is None else min_pixels
        other.max_pixels = self.max_pixels if max_pixels is None else max_pixels
        return other

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes preprocessor_config.json beside a model that was saved in `folder`. The bounds of
        videos are settings of a program and not in it."""
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, PREPROCESSOR), "w", encoding="utf-8") as file:
            json.dump({name: getattr(self, name) for name in SAVED} | KNOWN_AS, file, indent=2)

    def process_images(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """(h, w, 4, values) float32 of every picture; transparent parts become white."""
        bounds = self._bounds("", "an image")
        parts = []
        for image in images:
            if not isinstance(image, Image.Image):
                what = f"an image must be a PIL image, not {type(image).__name__}"
                hint = ": videos go to process_video" if isinstance(image, (list, tuple)) else ""
                raise ValueError(what + hint)
            parts.append(self._patches([self._levels(image, self._grid(image.size, *bounds))]))
        return parts

    def process_video(self, frames: Sequence[Image.Image], fps: float = FPS) -> Video:
        """A video of frames of one size, taken `fps` times a second; the last one counts twice
        where their number is odd. Transparent parts become white."""
        frames = list(frames)
        if odd := [type(frame).__name__ for frame in frames if not isinstance(frame, Image.Image)]:
            raise ValueError(f"a video must be a list of PIL images, its frames, not of {odd[0]}")
        if not frames:
            raise ValueError("a video needs at least one frame")
        if len(sizes := {frame.size for frame in frames}) > 1:
            first, second = sorted(sizes)[:2]
            raise ValueError(
                f"the frames of a video must have one size, not {first[0]} x {first[1]} and "
                f"{second[0]} x {second[1]}"
            )
        if not 0 < fps < math.inf:
            raise ValueError(f"fps ({fps}) must be above 0: frames a second")
        low, high = self._bounds("video_", "a frame")
        bounds = frame_limits(low, high, self.video_total_pixels, len(frames))
        grid, step = self._grid(frames[0].size, *bounds), self.temporal_patch_size
        frames += frames[-1:] * (-len(frames) % step)
        pairs = [
            self._patches([self._levels(frame, grid) for frame in frames[n : n + step]])
            for n in range(0, len(frames), step)
        ]
        return Video(torch.stack(pairs), step / fps)

    def _bounds(self, prefix: str, what: str) -> tuple[int, int]:
        """The two settings that bound the area of an image, or of a frame of a video."""
        names = f"{prefix}min_pixels", f"{prefix}max_pixels"
        low, high = (getattr(self, name) for name in names)
        block = (self.patch_size * self.merge_size) ** 2
        if not 0 < low <= high or high < block:
            raise ValueError(
                f"{names[0]} {low} and {names[1]} {high} leave no size for {what}: a token stands "
                f"for {block} pixels"
            )
        return low, high

    def _grid_thw(self, pixels: Tensor) -> list[int]:
        """Pairs of frames, rows and columns of patches of (t, h, w, M, values)."""
        pairs, rows, columns = pixels.shape[:3]
        return [pairs, rows * self.merge_size, columns * self.merge_size]

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) tokens that a picture of this (width, height) becomes.

        Raises ValueError where it is too small or too thin, see `smart_resize`.
        """
        return self._grid(size, self.min_pixels, self.max_pixels)

    def _grid(self, size: tuple[int, int], low: int, high: float) -> tuple[int, int]:
        """Likewise, within bounds of the area."""
        block = self.patch_size * self.merge_size
        height, width = smart_resize(size[1], size[0], block, low, high)
        return height // block, width // block

    def split(self, pixel_values: Tensor, image_grid_thw: Tensor) -> list[Tensor]:
        """What `process_images` gives, from what `preprocess` gives."""
        return split_images(pixel_values, image_grid_thw, self.merge_size)

    def _levels(self, image: Image.Image, grid: tuple[int, int]) -> np.ndarray:
        """(height, width, 3) levels from 0 to 255 of an image that becomes (h, w) tokens."""
        block = self.patch_size * self.merge_size
        size = grid[1] * block, grid[0] * block
        return np.asarray(to_rgb(image).resize(size, Image.Resampling.BICUBIC))

    def _patches(self, frames: list[np.ndarray]) -> Tensor:
        """(h, w, M, values) of levels (height, width, 3): one picture, or a pair of frames."""
        patch, merge = self.patch_size, self.merge_size
        h, w = (side // (patch * merge) for side in frames[0].shape[:2])
        values = np.empty((h, w, merge, merge, 3, self.temporal_patch_size, patch, patch), "f4")
        for number, levels in enumerate(frames):
            levels = levels.reshape(h, merge, patch, w, merge, patch, 3)
            # (h, inner row, y, w, inner column, x, channel) -> (h, w, row, column, channel, y, x)
            levels = levels.transpose(0, 3, 1, 4, 6, 2, 5)
            where = slice(None) if len(frames) == 1 else slice(number, number + 1)
            for channel, table in enumerate(self._tables()):
                own = table[levels[:, :, :, :, channel]][:, :, :, :, None]
                values[:, :, :, :, channel, where] = own
        return torch.from_numpy(values.reshape(h, w, merge * merge, -1))

    def _tables(self) -> np.ndarray:
        """(3, 256) normalised value of every level of every channel."""
        share = (np.arange(256) * (1 / 255)).astype(np.float32)
        mean, std = (np.array(x, np.float32)[:, None] for x in (self.image_mean, self.image_std))
        return (share - mean) / std


def token_masks(
    grids: list[tuple[int, int]], boxes: Sequence | None, masks: Sequence | None
) -> list[Tensor | None] | None:
    """(h, w) True on tokens in the boxes, or where a mask is, of pictures of these grids."""
    given, to_cells = (boxes, boxes_to_cells) if masks is None else (masks, mask_to_cells)
    if given is None:
        return None
    if boxes is not None and masks is not None:
        raise ValueError("give normed_bboxes or ref_image_masks, not both")
    if len(given) != len(grids):
        raise ValueError(f"{len(given)} boxes or masks for {len(grids)} pictures: give one each")
    pairs = zip(given, grids, strict=True)
    return [None if own is None else to_cells(own, grid) for own, grid in pairs]


def split_images(pixel_values: Tensor, image_grid_thw: Tensor, merge: int = 2) -> list[Tensor]:
    """Tensors (h, w, 4, values), one per image, of patches (n, values) and their grids (images, 3)
    as the processor of transformers gives them. Raises ValueError when the two do not fit."""
    names = "pixel_values", "image_grid_thw"
    parts = split_patches(pixel_values, image_grid_thw, merge, names)
    if odd := [len(part) for part in parts if len(part) > 1]:
        raise ValueError(
            f"image_grid_thw holds {odd[0]} pairs of frames: videos come as pixel_values_videos "
            "and video_grid_thw"
        )
    return [part[0] for part in parts]


def pixels_of_blocks(blocks: Tensor, merge: int, patch: int, frames: int = 1) -> Tensor:
    """(frames, 3, height, width) of blocks (h, w, M, values): the first frame of an image, whose
    others are the same, or as many as a video has in its pairs."""
    values = blocks.unflatten(3, (3, -1, patch, patch)).unflatten(2, (merge, merge))
    h, w = blocks.shape[:2]
    # (h, w, row, column, channel, frame, y, x) -> (frame, channel, h, row, y, w, column, x)
    pixels = values[:, :, :, :, :, :frames].permute(5, 4, 0, 2, 6, 1, 3, 7)
    return pixels.reshape(-1, 3, h * merge * patch, w * merge * patch)


def blocks_of_pixels(pixels: Tensor, merge: int, patch: int, frames: int = 2) -> Tensor:
    """The way back, to blocks of so many frames; one stands for all of them."""
    h, w = (side // (merge * patch) for side in pixels.shape[2:])
    blocks = pixels.reshape(-1, 3, h, merge, patch, w, merge, patch)
    blocks = blocks.expand(frames, *[-1] * 7).permute(2, 5, 3, 6, 1, 0, 4, 7)
    return blocks.reshape(h, w, merge * merge, -1)


def is_empty(given) -> bool:
    """Whether it is a list or tuple of nothing."""
    return isinstance(given, (list, tuple)) and not given


def smart_resize(
    height: int,
    width: int,
    factor: int = 28,
    min_pixels: int = 56 * 56,
    max_pixels: float = 12845056,
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
