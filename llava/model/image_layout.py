"""Where the tokens of one image stand in the prompt: crop after crop, or as one large grid.

Works for any subset of the patches, so pruned and unpruned images take the same path.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..pruning.ops import on_device, true_first
from ..pruning.per_token import each, with_zeros
from ..pruning.required import required
from ..pruning.tokens import MERGED, ImageLayout, ImageTokens, VisionTokens


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


def image_layout(
    crops: slice,
    tiles: tuple[int, int] | None,
    grid: tuple[int, int],
    image_size: tuple[int, int] | None,
) -> ImageLayout:
    """Layout of an image of which `crops` show tiles (across, down) of `grid` patches each.

    image_size: (width, height), to cut off the padding around the image; None: it stays
    """
    if tiles is None:
        return ImageLayout(crops)
    height, width = tiles[1] * grid[0], tiles[0] * grid[1]
    window = (0, height, 0, width)
    if image_size is not None:
        window = unpad_window(height, width, image_size)
    return ImageLayout(crops, tiles, window)


def unpad_image(tensor: Tensor, original_size: tuple[int, int]) -> Tensor:
    """Cuts the padding off a map (C, H, W) of an image of size (width, height) that was padded."""
    _, height, width = tensor.shape
    top, bottom, left, right = unpad_window(height, width, original_size)
    return tensor[:, top:bottom, left:right]


def flat_layout(
    vision: VisionTokens, crops: slice, num_patches: int, axes: Tensor | None = None
) -> ImageTokens:
    """Crop after crop, tokens of a crop in their order; axes: their `ImageTokens.positions`."""
    positions, grid = vision.positions[crops], vision.grid
    count = positions.shape[0]
    shift = torch.arange(count, device=positions.device)[:, None] * num_patches
    image = ImageTokens(
        embeds=vision.features[crops].flatten(0, 1),
        patches=_patch_numbers(vision, crops, shift, num_patches),
        offsets=(positions + shift).flatten(),
        length=count * num_patches,
        extras=_extras(vision, crops),
        blocks=(grid if math.prod(grid) == num_patches else (1, num_patches),) * count,
        crops=count,
        positions=axes,
        grid=grid,
    )
    if vision.valid is None:
        return image
    # The places of tokens come before those of padding.
    order = true_first(vision.valid[crops].flatten())
    return image.keep(order[: sum(vision.crop_counts()[crops])])


def spatial_layout(
    vision: VisionTokens, layout: ImageLayout, num_patches: int, newline: Tensor | None
) -> ImageTokens:
    """The overview crop, then all tiles read as one grid, row by row across tiles.

    newline: (D,) embedding that ends every grid row; None: rows end with nothing.
    """
    crops, mosaic = layout.crops, required(layout.mosaic, "the image was not cut into tiles")
    (across, _), (top, bottom, left, right) = mosaic
    base = flat_layout(vision, slice(crops.start, crops.start + 1), num_patches)
    grid = slice(crops.start + 1, crops.stop)
    rows, columns = vision.grid
    positions = vision.positions[grid]
    tile = torch.arange(positions.shape[0], device=positions.device)[:, None]
    row = (tile // across * rows + positions // columns).flatten()
    column = (tile % across * columns + positions % columns).flatten()
    stride = right - left + (newline is not None)
    length = (bottom - top) * stride
    offsets = (row - top) * stride + column - left
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    # Tokens that stand for no patch follow the grid; `outer` is their order there.
    in_grid = ((positions >= 0) & (positions < num_patches)).flatten()
    outer = positions + tile * (positions.shape[1] + num_patches)
    outer = torch.where(positions < 0, tile, outer + len(positions)).flatten()
    offsets = torch.where(in_grid, offsets, length + outer)
    chosen = inside | ~in_grid
    if vision.valid is not None:
        chosen = chosen & vision.valid[grid].flatten()
    count = chosen_tokens(vision, layout, chosen)
    tokens = ImageTokens(
        embeds=vision.features[grid].flatten(0, 1),
        patches=_patch_numbers(vision, grid, (tile + 1) * num_patches, num_patches),
        offsets=offsets.masked_fill(~chosen, torch.iinfo(offsets.dtype).max),
        length=length,
        extras=_extras(vision, grid),
    )
    if newline is not None:
        ends = torch.arange(bottom - top, device=offsets.device) * stride + stride - 1
        tokens, count = _append(tokens, newline, ends), count + bottom - top
    tokens = tokens.keep(tokens.offsets.argsort(stable=True)[:count])
    return ImageTokens(
        embeds=torch.cat([base.embeds, tokens.embeds]),
        patches=torch.cat([base.patches, tokens.patches]),
        offsets=torch.cat([base.offsets, tokens.offsets + num_patches]),
        length=num_patches + length,
        extras={k: torch.cat([base.extras[k], own]) for k, own in tokens.extras.items()},
        blocks=(*base.blocks, (bottom - top, stride)),
        crops=crops.stop - crops.start,
        grid=vision.grid,
    )


def chosen_tokens(vision: VisionTokens, layout: ImageLayout, chosen: Tensor) -> int:
    """How many of the tiles' tokens are `chosen` (n,): those in the window of the image and those
    that stand for no patch. Waits for the device only where a method left some of the patches and
    the window leaves out others."""
    (across, down), window = required(layout.mosaic, "the image was not cut into tiles")
    top, bottom, left, right = window
    if vision.complete:
        return (bottom - top) * (right - left)
    rows, columns = vision.grid
    if window == (0, down * rows, 0, across * columns):
        return sum(vision.crop_counts()[layout.crops.start + 1 : layout.crops.stop])
    return int(chosen.sum())


def with_newline(tokens: ImageTokens, newline: Tensor) -> ImageTokens:
    """One newline embedding (D,) after the tokens, as single-crop images of LLaVA-NeXT have it."""
    image = _append(tokens, newline, tokens.offsets.new_full((1,), tokens.length))
    image.length += 1
    image.blocks, image.grid = (*tokens.blocks, (1, 1)), tokens.grid
    return image


def _append(tokens: ImageTokens, newline: Tensor, offsets: Tensor) -> ImageTokens:
    """Newline embeddings at `offsets` (m,), behind the tokens."""
    count = len(offsets)
    return ImageTokens(
        embeds=torch.cat([tokens.embeds, newline.to(tokens.embeds.dtype).expand(count, -1)]),
        patches=torch.cat([tokens.patches, torch.full_like(offsets, -1)]),
        offsets=torch.cat([tokens.offsets, offsets]),
        length=tokens.length,
        extras=each(tokens.extras, with_zeros(count), axis=0),
    )


def _extras(vision: VisionTokens, crops: slice) -> dict[str, Tensor]:
    """The extras of the crops' tokens (n, ...), crop after crop, that travel on."""
    own = {name: values for name, values in vision.extras.items() if name != MERGED}
    return {name: values[crops].flatten(0, 1) for name, values in own.items()}


def _patch_numbers(vision, crops: slice, shift: Tensor, num_patches: int) -> Tensor:
    """crop * N + patch of every token; -1 on tokens that are no patch."""
    positions = vision.positions[crops]
    no_patch = (positions < 0) | (positions >= num_patches)
    if MERGED in vision.extras:
        no_patch = no_patch | vision.extras[MERGED][crops]
    return (positions + shift).masked_fill(no_patch, -1).flatten()


def own_grid_layout(
    vision: VisionTokens, crops: slice, length: int, times: list[int] | None = None
) -> ImageTokens:
    """An image with a grid of its own, in models whose positions are time, row and column: tokens
    stand where they are in the grid, and the text goes on behind its longer side. One that stands
    for no place of the grid gets the last one, or the first where its position is below 0.

    crops:  the image, or the pairs of frames of a video
    length: tokens of the unpruned image
    times:  of a video, position in time of every pair; None: this is an image
    """
    (height, width), size = vision.grid, math.prod(vision.grid)
    place = vision.positions[crops].clamp(0, size - 1)  # (t, T)
    time = torch.zeros_like(place)
    if times is not None:
        time = on_device(times, place.device)[:, None].expand_as(place)
    axes = torch.stack([time, place // width, place % width], dim=-1)
    image = flat_layout(vision, crops, size, axes.flatten(0, 1))
    image.length, image.places = length, max(height, width)
    if times is not None:
        image.frame_pairs, image.places = len(times), max(image.places, times[-1] + 1)
    return image
