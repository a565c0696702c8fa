"""Pictures of what a pruning method kept: the dropped patches of an image darkened."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.image_settings import ImageSettings
from llava.pruning import PruningTrace
from llava.pruning.frames import crop_frames, image_frames

PANEL_SIDE = 560  # pixels of the longer side of every panel
GAP = 12  # pixels between panels and around the text
TEXT_SIZE = 18
DIM = 0.25  # brightness that a dropped patch keeps
OUTLINE = (255, 200, 0)
SHOTS = 6  # frames of a video that are drawn
HEAT = 0.5  # share of the colour in a map of importance


def surviving_patches(trace: PruningTrace, input_ids: Tensor) -> list[Tensor]:
    """As `survivors`, of the one prompt of the trace; input_ids: (L,)"""
    return survivors(trace, [input_ids])[0]


def survivors(trace: PruningTrace, prompts: list[Tensor]) -> list[list[Tensor]]:
    """Per prompt and image the patches, crop * N + patch, of tokens that leave the last layer of
    the prefill. Merged and newline tokens (-1) stay in.

    prompts: ids (L,) of those of the trace, -200 for an image
    """
    size, images = trace.prompt_size, iter(trace.visual_positions)
    last = trace.decoder_keep[max(trace.decoder_keep)] if trace.decoder_keep else None
    beams = 1 if last is None else len(last) // len(prompts)
    found: list[list[Tensor]] = []
    for number, ids in enumerate(prompts):
        alive = torch.full((size,), last is None)
        if last is not None:
            kept = last[number * beams]
            alive[kept[kept >= 0]] = True
        places = (ids == IMAGE_TOKEN_INDEX).nonzero()[:, 0].tolist()
        own = [next(images) for _ in places]
        # An image takes the place of its mark, and prompts are padded on the left.
        grown = size - (len(ids) - len(own) + sum(map(len, own)))
        found.append([])
        for place, patches in zip(places, own, strict=True):
            start = grown + place
            found[-1].append(patches[alive[start : start + len(patches)]])
            grown += len(patches) - 1
    return found


def crop_boxes(size: tuple[int, int], settings: ImageSettings, tower) -> list[np.ndarray]:
    """Where the patches of every crop lie on an image of (width, height) pixels.

    One array (N, 4) of left, top, right, bottom per crop, in the order of `process_images`; boxes
    on padding lie outside of the image.
    """
    cells = (tower.num_patches_per_side,) * 2
    return [_grid(cells, *frame) for frame in crop_frames(size, settings, tower.image_size)]


def token_boxes(size: tuple[int, int], model, grid: tuple[int, int]) -> list[np.ndarray]:
    """As `crop_boxes`, for the method in use; `grid` is that of the image's crops."""
    return [_grid(grid, *frame) for frame in image_frames(size, model)]


def _grid(
    grid: tuple[int, int], left: float, top: float, width: float, height: float
) -> np.ndarray:
    rows, columns = grid
    row, column = np.divmod(np.arange(rows * columns), columns)
    x, y = left + column * width / columns, top + row * height / rows
    return np.stack([x, y, x + width / columns, y + height / rows], axis=1)


def draw_image(image: Image.Image, patches: Tensor, boxes: list[np.ndarray]) -> list[Image.Image]:
    """One panel for the whole image, and one for all tiles where there are any."""
    per_crop = len(boxes[0])
    kept = patches[patches >= 0].numpy()
    panels = []
    for crops in (range(0, 1), range(1, len(boxes))):
        if len(crops):
            own = kept[(kept >= crops.start * per_crop) & (kept < crops.stop * per_crop)]
            panels.append(_panel(image, np.concatenate(boxes)[own]))
    return panels


def _panel(image: Image.Image, kept: np.ndarray) -> Image.Image:
    scale = PANEL_SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    bright = np.asarray(image.convert("RGB").resize((width, height)), dtype=np.float32)
    corners = np.rint(kept * scale).astype(int)
    corners = np.clip(corners, 0, [width, height, width, height])
    corners = corners[(corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])]
    mask = np.zeros((height, width, 1), dtype=bool)
    for left, top, right, bottom in corners:
        mask[top:bottom, left:right] = True
    panel = Image.fromarray(np.where(mask, bright, bright * DIM).astype(np.uint8))
    draw = ImageDraw.Draw(panel)
    for left, top, right, bottom in corners:
        draw.rectangle((left, top, right - 1, bottom - 1), outline=OUTLINE)
    return panel


def importance_of_patches(values: Tensor, patches: Tensor, count: int) -> list[float]:
    """A value for each of the `count` patches of an image, from those of its visual tokens.

    values, patches: (n,) as in `PruningTrace`; patches without a value get the lowest of the others
    """
    judged = values.isfinite() & (patches >= 0)
    lowest = values[judged].amin() if judged.any() else values.new_zeros(())
    full = lowest.repeat(count)
    full[patches[judged]] = values[judged]
    return full.tolist()


def draw_importance(
    image: Image.Image, values: list[float], boxes: list[np.ndarray]
) -> list[Image.Image]:
    """Panels as in `draw_image`, the patches coloured by their value: blue is low, red is high.

    values: one per patch, in the order of `boxes`
    """
    per_crop, given = len(boxes[0]), np.asarray(values, dtype=np.float32)
    low, high = given.min(), given.max()
    levels = (given - low) / max(high - low, np.finfo(np.float32).tiny)
    panels = []
    for crops in (range(0, 1), range(1, len(boxes))):
        own = slice(crops.start * per_crop, crops.stop * per_crop)
        if len(crops):
            panels.append(_heat_panel(image, np.concatenate(boxes)[own], levels[own]))
    return panels


def _heat_panel(image: Image.Image, boxes: np.ndarray, levels: np.ndarray) -> Image.Image:
    scale = PANEL_SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    heat = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(heat)
    for (left, top, right, bottom), level in zip(boxes * scale, levels, strict=False):
        hue = round(170 * (1 - float(level)))  # 170 of 255 is blue, 0 is red
        draw.rectangle((left, top, right, bottom), f"hsv({hue * 360 // 255}, 100%, 100%)")
    grey = image.convert("L").convert("RGB").resize((width, height))
    return Image.blend(grey, heat, HEAT)


def side_by_side(panels: list[Image.Image], text: str) -> Image.Image:
    """The panels in a row with lines of text below them."""
    font = ImageFont.load_default(TEXT_SIZE)
    width = sum(panel.width for panel in panels) + GAP * (len(panels) + 1)
    lines = _wrap(text, font, width - 2 * GAP)
    line_height = math.ceil(TEXT_SIZE * 1.4)
    height = max(panel.height for panel in panels) + 3 * GAP + line_height * len(lines)
    sheet = Image.new("RGB", (width, height), "white")
    left = GAP
    for panel in panels:
        sheet.paste(panel, (left, GAP))
        left += panel.width + GAP
    top = height - GAP - line_height * len(lines)
    for number, line in enumerate(lines):
        ImageDraw.Draw(sheet).text((GAP, top + number * line_height), line, "black", font)
    return sheet


def _wrap(text: str, font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


@dataclass
class Shot:
    """An image, or a pair of frames of a video by its first one.

    patches:   patches of what is left of it
    positions: those of all its visual tokens that entered the decoder
    values:    how important the method finds each of these; None: it does not say
    """

    image: Image.Image
    patches: Tensor
    positions: Tensor
    values: Tensor | None


def shots_of_video(frames: list[Image.Image], whole: Shot, size: int) -> list[Shot]:
    """Up to `SHOTS` pairs of frames of a video, spread uniformly; size: patches of a pair."""
    pairs = math.ceil(len(frames) / 2)
    count = min(pairs, SHOTS)
    shots = []
    for pair in (round(shot * (pairs - 1) / max(1, count - 1)) for shot in range(count)):
        kept, own = (x // size == pair for x in (whole.patches, whole.positions))
        values = None if whole.values is None else whole.values[own]
        shots.append(
            Shot(
                frames[2 * pair],
                whole.patches[kept] % size,
                whole.positions[own] % size,
                values,
            )
        )
    return shots


def show_pruning(
    images: list[Image.Image | list[Image.Image]],
    trace: PruningTrace,
    input_ids: Tensor,
    model,
    text: str = "",
) -> Image.Image:
    """The images of one prompt, side by side, with what the traced `generate` call kept of them;
    of a video, which is a list of frames, some pairs of frames.

    Where the method says how important it found every patch, a map of that follows each image.

    input_ids: (L,) ids of the prompt. text: goes into the caption behind method and token counts.
    """
    left = surviving_patches(trace, input_ids)
    panels, total, maps, extra = [], 0, trace.importance, ""
    for number, (image, patches) in enumerate(zip(images, left, strict=True)):
        values, grid = None if maps is None else maps[number], trace.grids[number]
        first = image[0] if isinstance(image, list) else image
        whole, times = Shot(first, patches, trace.visual_positions[number], values), 1
        shots = [whole]
        if isinstance(image, list):
            shots, times = shots_of_video(image, whole, math.prod(grid)), math.ceil(len(image) / 2)
            extra = f"; {len(shots)} of the {times} pairs of frames of a video"
        for shot in shots:
            boxes = token_boxes(shot.image.size, model, grid)
            count = sum(map(len, boxes))
            panels += draw_image(shot.image, shot.patches, boxes)
            if len(boxes) > 1:
                extra = "; each image twice: patches of the overview, patches of the tiles"
            if shot.values is not None:
                judged = importance_of_patches(shot.values, shot.positions, count)
                panels += draw_importance(shot.image, judged, boxes)
        total += count * times
    caption = f"{model.pruner!r}: {sum(map(len, left))} visual tokens of {total} patches"
    mean = sum(int(tokens[0]) for tokens in trace.visual_tokens) / len(trace.visual_tokens)
    if trace.decoder_keep:
        caption += f", {mean:.1f} on average over the decoder's layers"
    merged = sum(int((patches < 0).sum()) for patches in left)
    if merged:
        caption += f" ({merged} of them, merged or newline tokens, have no place of their own)"
    if maps is not None:
        caption += "; coloured: how important the method finds each patch, from blue to red"
    return side_by_side(panels, f"{caption}{extra}. {text}".strip())
