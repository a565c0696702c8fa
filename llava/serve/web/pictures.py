"""Pictures of a report: the kept patches at every stage, and the importance map of a method."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from PIL import Image

from llava.image_io import displayed
from llava.pruning.picture import PANEL_SIDE, draw_image, draw_importance

from .report import ImageReport, Report

IMPORTANCE = "importance"  # title of the map
QUALITY = 82  # of the JPEG files in the page


@dataclass(frozen=True)
class View:
    """
    panels: pictures, one or more for every image
    kept:   patches that are kept, for every image; empty where the pictures show something else
    alt:    what the pictures show, for those who do not see them
    """

    title: str
    panels: list[Image.Image]
    kept: list[int]
    alt: str


def stages(images: list[Image.Image], report: Report) -> list[View]:
    """One for every stage of the pruning that dropped patches, the importance map last.

    images: what was sent with the question, in its order
    """
    views = [_stage("kept before the decoder", images, report, lambda image: image.kept)]
    layers = sorted({layer for image in report.images for layer, _ in image.layers})
    for before, layer in pairwise([-1, *layers]):
        patches = partial(_patches_at, layer=layer)
        if all(patches(image) == _patches_at(image, before) for image in report.images):
            continue  # only other tokens left, such as those a method had put behind the prompt
        views.append(_stage(f"from layer {layer} on", images, report, patches))
    if any(image.importance for image in report.images):
        alt = "importance of the patches to the method, from blue to red"
        views.append(View(IMPORTANCE, _importance(images, report), [], alt))
    return views


def _stage(title: str, images, report: Report, patches_of) -> View:
    kept = [len(patches_of(image)) for image in report.images]
    counts = ", ".join(
        f"{count} of {image.total}" for count, image in zip(kept, report.images, strict=True)
    )
    alt = f"{title}: {counts} patches of the image are kept and bright, the others dark"
    return View(title, _all(images, report, patches_of), kept, alt)


def data_uri(image: Image.Image, side: int = PANEL_SIDE) -> str:
    """The image, at most `side` pixels long, as text for the `src` of an <img>."""
    small = displayed(image).copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _patches_at(image: ImageReport, layer: int) -> list[int]:
    reached = [patches for at, patches in image.layers if at <= layer]
    return reached[-1] if reached else image.kept


def _all(images, report, patches_of) -> list[Image.Image]:
    panels = []
    for image, entry in zip(images, report.images, strict=False):
        patches = torch.tensor(patches_of(entry), dtype=torch.long)
        panels += draw_image(image, patches[patches < entry.total], _boxes(image, entry))
    return panels


def _importance(images, report) -> list[Image.Image]:
    return [
        panel
        for image, entry in zip(images, report.images, strict=False)
        if entry.importance
        for panel in draw_importance(image, entry.importance, _boxes(image, entry))
    ]


def _boxes(image: Image.Image, entry: ImageReport) -> list[np.ndarray]:
    """Per crop the places of its patches on the image, (N, 4) in pixels."""
    rows, columns = entry.grid
    row, column = np.divmod(np.arange(rows * columns), columns)
    cells = np.stack([column, row, column + 1, row + 1], axis=1) / [columns, rows, columns, rows]
    boxes = []
    for left, top, right, bottom in entry.crops or [_padded(image)]:
        corner, size = np.array([left, top] * 2), np.array([right - left, bottom - top] * 2)
        boxes.append((corner + cells * size) * (image.size * 2))
    return boxes


def _padded(image: Image.Image) -> list[float]:
    """The square around the centred image, in shares of its width and height."""
    across, down = (max(image.size) / side for side in image.size)
    return [(1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2]
