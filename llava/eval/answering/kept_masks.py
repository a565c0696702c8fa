"""Which patches of its images a prompt kept, beside those that boxes around the answer cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from llava.eval.files import box_counts
from llava.model.inputs import Picture
from llava.pruning import PruningTrace
from llava.pruning.frames import covered, image_frames
from llava.pruning.picture import survivors

Boxes = Sequence[Sequence[float]]


@dataclass(frozen=True, eq=False)
class KeptMask:
    """One image, one value for each patch; crops, and moments of a video, stand below each other.

    kept:      (rows, columns) True where a token is left behind the last layer
    reference: the same for the boxes; None: none are known, or they lie beside what the model sees
    frames:    what each crop shows of the image, see `crop_frames`
    """

    kept: np.ndarray
    reference: np.ndarray | None = None
    frames: tuple = ()


def kept_masks(
    trace: PruningTrace,
    prompts: list[Tensor],
    pictures: list[list[Picture]],
    boxes: list[Sequence[Boxes] | None],
    model,
) -> list[tuple[KeptMask, ...] | None]:
    """The masks of every prompt of a traced batch, one for each image; None where a method left
    tokens that have no place in their image, and no others.

    prompts: ids (L,); boxes: per prompt those of each image, in its pixels, or None
    """
    grids, entered, found = iter(trace.grids), iter(trace.visual_positions), []
    left = survivors(trace, prompts)
    for own, patches, known in zip(pictures, left, boxes, strict=True):
        masks = []
        for number, (picture, kept) in enumerate(zip(own, patches, strict=True)):
            frames, grid = image_frames(picture.size, model), next(grids)
            last = max(next(entered).tolist(), default=0)
            if len(frames) == 1:  # a video shows the same frame many times
                frames *= max(1, last // (grid[0] * grid[1]) + 1)
            cells = np.zeros(len(frames) * grid[0] * grid[1], dtype=bool)
            cells[kept[kept >= 0].numpy()] = True
            reference = None
            if known is not None:
                inside = covered(known[number], frames, grid)
                if inside.any() or not known[number]:
                    reference = inside.flatten(0, 1).numpy()
            masks.append(KeptMask(cells.reshape(-1, grid[1]), reference, tuple(frames)))
        placed = any(mask.kept.any() for mask in masks) or not sum(map(len, patches))
        found.append(tuple(masks) if placed else None)
    return found


def metadata(masks: tuple[KeptMask, ...] | None) -> dict:
    """What the answer line says of its masks; nothing where no boxes are known."""
    if not masks or any(mask.reference is None for mask in masks):
        return {}
    kept = np.concatenate([mask.kept.ravel() for mask in masks])
    reference = np.concatenate([mask.reference.ravel() for mask in masks])
    return {box_counts.KEY: box_counts.counts(kept, reference)}
