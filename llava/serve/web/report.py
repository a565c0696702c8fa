"""The pruning report of an answer: what a worker says it kept, checked before it is drawn."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ImageReport:
    """One image. Patches are numbered crop * N + patch.

    kept:       patches of the tokens that enter the decoder
    merged:     tokens that enter it without a place of their own: merged ones, line ends
    layers:     (layer, patches) for every layer before which tokens were dropped
    total:      patches of the image
    grid:       (rows, columns) of patches in a crop
    crops:      per crop (left, top, right, bottom) as shares of the image's width and height,
                None where the worker does not say
    importance: one value per patch, None where the method has no such map
    """

    kept: list[int]
    layers: list[tuple[int, list[int]]]
    total: int
    grid: tuple[int, int]
    merged: int = 0
    crops: list[list[float]] | None = None
    importance: list[float] | None = None


@dataclass(frozen=True)
class Report:
    """One answer.

    images:           one entry per image of the prompt
    tokens_per_layer: visual tokens entering each decoder layer
    dense_tokens:     visual tokens without pruning
    prefill_seconds:  time until the first token
    kv_bytes, dense_kv_bytes: size of the cache after the prefill, and without pruning
    data:             all of it as the worker sent it
    """

    method: str
    images: list[ImageReport]
    tokens_per_layer: list[int]
    dense_tokens: int
    prefill_seconds: float
    kv_bytes: int
    dense_kv_bytes: int
    data: dict = field(default_factory=dict, repr=False)

    @property
    def mean_tokens(self) -> float:
        """Visual tokens, averaged over the decoder's layers."""
        return sum(self.tokens_per_layer) / max(1, len(self.tokens_per_layer))


def read_report(data: dict | None) -> Report | None:
    """The report in `data`; None when there is none, or it is not one."""
    if not data or not data.get("images"):
        return None
    try:
        importance = data.get("importance") or [None] * len(data["images"])
        images = [
            ImageReport(
                [int(patch) for patch in image["kept"]],
                [(int(layer), [int(patch) for patch in kept]) for layer, kept in image["layers"]],
                int(image["total"]),
                (int(grid[0]), int(grid[1])),
                int(image.get("merged", 0)),
                image.get("crops") and [_box(crop) for crop in image["crops"]],
                values and [float(value) for value in values],
            )
            for image, grid, values in zip(data["images"], data["grid"], importance, strict=True)
        ]
        return Report(
            str(data["method"]),
            images,
            [int(tokens) for tokens in data["tokens_per_layer"]],
            int(data["dense_tokens"]),
            float(data["prefill_seconds"]),
            int(data["kv_bytes"]),
            int(data["dense_kv_bytes"]),
            data,
        )
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError):
        return None


def _box(crop) -> list[float]:
    left, top, right, bottom = map(float, crop)
    return [left, top, right, bottom]
