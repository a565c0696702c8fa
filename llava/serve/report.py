"""What a pruning method kept for one answer, as the last chunk of its stream tells it."""

from __future__ import annotations

from torch import Tensor

from ..constants import IMAGE_TOKEN_INDEX
from ..image_settings import ImageSettings
from ..pruning import Pruner, PruningTrace
from ..pruning.cost import kv_cache_bytes
from ..pruning.picture import crop_boxes, importance_of_patches
from .methods import settings

PLACEMENT = ("image_aspect_ratio", "image_grid_pinpoints")


def image_geometry(
    size: tuple[int, int], image_settings: ImageSettings, tower, pixels: Tensor
) -> dict:
    """Where the patches of an image of (width, height) come from, for a picture of them.

    pixels: as the tower takes them

    grid:  (h, w) patches of a crop
    crops: per crop (left, top, right, bottom) as shares of the image's width and height; outside
           of 0..1 is padding
    """
    if tower.grid is None:
        return {"grid": list(pixels.shape[:2]), "crops": [[0.0, 0.0, 1.0, 1.0]]}
    side = tower.num_patches_per_side
    width, height = size
    crops = []
    for boxes in crop_boxes(size, image_settings, tower):
        (left, top), (right, bottom) = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
        crops.append([left / width, top / height, right / width, bottom / height])
    return {"grid": [side, side], "crops": [[round(float(x), 5) for x in box] for box in crops]}


def placement(image_settings: ImageSettings) -> dict:
    """How images are cut."""
    return {key: getattr(image_settings, key) for key in PLACEMENT}


def pruning_report(
    pruner: Pruner, trace: PruningTrace, input_ids: Tensor, geometry: list[dict], place: dict
) -> dict:
    """The report of one prompt.

    trace:     of its prefill
    input_ids: (L,) ids of the prompt
    geometry:  one per image, see `image_geometry`
    place:     see `placement`
    """
    shapes = zip(geometry, trace.grids, strict=True)  # a method may have made an image smaller
    geometry = [{**shape, "grid": list(grid)} for shape, grid in shapes]
    tokens = [int(layer[0]) for layer in trace.visual_tokens]
    text = int(trace.prompt_tokens[0][0]) - tokens[0]
    dense = sum(trace.unpruned_lengths)
    return {
        "method": pruner.name,
        "options": settings(pruner),
        "grid": [image["grid"] for image in geometry],
        "images": _images(trace, input_ids, geometry),
        "tokens_per_layer": tokens,
        "dense_tokens": dense,
        "prompt_tokens": text,
        "kv_bytes": trace.kv_bytes,
        "dense_kv_bytes": kv_cache_bytes(trace.shape, (text + dense) * len(tokens)),
        "importance": _importance(trace, geometry),
        "placement": place,
    }


def _images(trace: PruningTrace, input_ids: Tensor, geometry: list[dict]) -> list[dict]:
    starts = _image_starts(input_ids, [len(patches) for patches in trace.visual_positions])
    images = []
    for patches, start, shape in zip(trace.visual_positions, starts, geometry, strict=True):
        layers = []
        for layer, rows in sorted(trace.decoder_keep.items()):
            inside = rows[0][(rows[0] >= start) & (rows[0] < start + len(patches))]
            layers.append([layer, _places(patches[inside - start])])
        images.append(
            {
                "kept": _places(patches),
                "merged": int((patches < 0).sum()),
                "total": _patches_of(shape),
                "layers": layers,
                "crops": shape["crops"],
            }
        )
    return images


def _image_starts(input_ids: Tensor, lengths: list[int]) -> list[int]:
    """Where each image starts in the prompt that enters the decoder."""
    starts, place, left = [], 0, iter(lengths)
    for token in input_ids.tolist():
        if token == IMAGE_TOKEN_INDEX:
            starts.append(place)
            place += next(left)
        else:
            place += 1
    return starts


def _places(patches: Tensor) -> list[int]:
    return patches[patches >= 0].tolist()


def _patches_of(shape: dict) -> int:
    rows, columns = shape["grid"]
    return rows * columns * len(shape["crops"])


def _importance(trace: PruningTrace, geometry: list[dict]) -> list[list[float]] | None:
    """Per image a value for every patch, None where the method has none."""
    if trace.importance is None:
        return None
    images = zip(trace.importance, trace.visual_positions, geometry, strict=True)
    maps = [importance_of_patches(v, patches, _patches_of(shape)) for v, patches, shape in images]
    return [[round(value, 5) for value in one] for one in maps]
