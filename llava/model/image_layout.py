"""Where the tokens of one image stand in the prompt: crop after crop, or as one large grid.

Works for any subset of the patches, so pruned and unpruned images take the same path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pruning.base import VisionTokens


@dataclass
class ImageTokens:
    """Tokens of one image in the order they enter the language model.

    embeds:  (n, D)
    patches: (n,) crop * N + patch; -1 on newline and merged tokens
    offsets: (n,) place in the sequence of the unpruned image
    length:  tokens of the unpruned image
    """

    embeds: Tensor
    patches: Tensor
    offsets: Tensor
    length: int


def unpad_window(height: int, width: int, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a padded map that holds the image of size (width, height).

    The order of the float operations is part of the contract: another one shifts token counts.
    """
    image_width, image_height = image_size
    if image_width / image_height > width / height:
        margin = (height - int(image_height * (width / image_width))) // 2
        return margin, height - margin, 0, width
    margin = (width - int(image_width * (height / image_height))) // 2
    return 0, height, margin, width - margin


def unpad_image(tensor: Tensor, original_size: tuple[int, int]) -> Tensor:
    """Cuts the padding off a map (C, H, W) of an image of size (width, height) that was padded."""
    top, bottom, left, right = unpad_window(*tensor.shape[1:], original_size)
    return tensor[:, top:bottom, left:right]


def flat_layout(vision: VisionTokens, crops: slice, num_patches: int) -> ImageTokens:
    """Crop after crop, tokens of a crop in their order."""
    positions = vision.positions[crops]
    count = positions.shape[0]
    shift = torch.arange(count, device=positions.device)[:, None] * num_patches
    offsets, chosen = (positions + shift).flatten(), _chosen(vision, crops)
    embeds = vision.features[crops].flatten(0, 1)
    patches = _mark_merged(offsets, vision, crops)
    if chosen is not None:
        embeds, patches, offsets = embeds[chosen], patches[chosen], offsets[chosen]
    return ImageTokens(embeds, patches, offsets, count * num_patches)


def spatial_layout(
    vision: VisionTokens,
    crops: slice,
    num_patches: int,
    tiles: tuple[int, int],
    image_size: tuple[int, int],
    newline: Tensor | None,
) -> ImageTokens:
    """The overview crop, then all tiles read as one grid, row by row across tiles.

    tiles: (across, down); newline: (D,) embedding that ends every grid row once the padding around
    the image is cut off; None: keep the padded grid and end rows with nothing.
    """
    base = flat_layout(vision, slice(crops.start, crops.start + 1), num_patches)
    grid = slice(crops.start + 1, crops.stop)
    rows, columns = vision.grid
    positions = vision.positions[grid]
    tile = torch.arange(positions.shape[0], device=positions.device)[:, None]
    row = (tile // tiles[0] * rows + positions // columns).flatten()
    column = (tile % tiles[0] * columns + positions % columns).flatten()
    patches = (positions + (tile + 1) * num_patches).flatten()
    patches = patches if vision.merged is None else _mark_merged(patches, vision, grid)
    height, width = tiles[1] * rows, tiles[0] * columns
    window = (0, height, 0, width)
    if newline is not None:
        window = unpad_window(height, width, image_size)
    top, bottom, left, right = window
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    if (chosen := _chosen(vision, grid)) is not None:
        inside = inside & chosen
    num_rows, stride = bottom - top, right - left + (newline is not None)
    offsets = ((row - top) * stride + column - left)[inside]
    embeds, patches = vision.features[grid].flatten(0, 1)[inside], patches[inside]
    if newline is not None:
        ends = torch.arange(num_rows, device=offsets.device) * stride + stride - 1
        offsets = torch.cat([offsets, ends])
        embeds = torch.cat([embeds, newline.to(embeds.dtype).expand(num_rows, -1)])
        patches = torch.cat([patches, torch.full_like(ends, -1)])
    order = offsets.argsort(stable=True)
    return ImageTokens(
        embeds=torch.cat([base.embeds, embeds[order]]),
        patches=torch.cat([base.patches, patches[order]]),
        offsets=torch.cat([base.offsets, offsets[order] + num_patches]),
        length=num_patches + num_rows * stride,
    )


def with_newline(tokens: ImageTokens, newline: Tensor) -> ImageTokens:
    """One newline embedding (D,) after the tokens, as single-crop images of LLaVA-NeXT have it."""
    return ImageTokens(
        embeds=torch.cat([tokens.embeds, newline.to(tokens.embeds.dtype)[None]]),
        patches=torch.cat([tokens.patches, tokens.patches.new_full((1,), -1)]),
        offsets=torch.cat([tokens.offsets, tokens.offsets.new_full((1,), tokens.length)]),
        length=tokens.length + 1,
    )


def _chosen(vision: VisionTokens, crops: slice) -> Tensor | None:
    return None if vision.valid is None else vision.valid[crops].flatten()


def _mark_merged(patches: Tensor, vision: VisionTokens, crops: slice) -> Tensor:
    if vision.merged is None:
        return patches
    return patches.masked_fill(vision.merged[crops].flatten(), -1)
