"""Cues: what a vision tower can tell a method about the tokens, beside their features.

A tower says which ones it has (`provides`, `provides_in_layers`), a method which ones it cannot do
without (`needs`, `tower_extras`) and which ones it takes where they are there (`wants`). Both are
compared when the method is assigned. Letters in shapes as in `llava.pruning.tokens`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .interfaces import Tower
from .stages import VisionStage, fills

#: cue -> what it is
CUES = {
    "salience": "(B, N) fp32, how much attention a token receives: from the class token, mean over "
    "heads; in a tower without one from all patches, mean over heads",
    "cls_attention": "(B, H, N) fp32, what the class token attends to",
    "cls_token": "(B, 1, C), the class token",
    "cls_query": "(B, C), the query of the class token",
    "cls_key": "(B, C), the key of the class token",
    "keys": "(B, N, width), attention keys",
    "attention_mean": "(B, N) fp32, how much attention a token receives, mean over heads and all "
    "queries",
    "output": "(B, N, C), what a layer gives",
    "output_mean": "(B, N, C) fp32, the mean of what all those layers give that it is asked of; it "
    "stands at the last of them",
    "fingerprint": "(B,) an integer that depends on the pixels alone",
    "tower_tokens": "the tokens between layers, to be changed there",
    "one_grid": "one grid of patches for all images",
    "text_tower": "a text tower that reads questions in the space of the patches",
}


class Method(Protocol):
    """What is read here of a `Pruner`."""

    name: ClassVar[str]

    def __init__(self) -> None: ...

    @property
    def vision(self) -> VisionStage: ...


def check_needs(stage: VisionStage, tower: Tower, methods: Iterable[type[Method]] = ()) -> None:
    """Raises ValueError where a method needs what the tower does not have.

    methods: classes of methods, of which the message names those that work with the tower
    """
    acts = fills(type(stage), VisionStage, "before_tower_layer")
    acts = acts and not (stage.merges_blocks and tower.grid is None)
    needs = stage.needs | (frozenset({"tower_tokens"}) if acts else frozenset())
    _check(stage, tower, needs, tower.provides, methods)


def check_cues(stage: VisionStage, tower: Tower, methods: Iterable[type[Method]] = ()) -> None:
    """Likewise, what it needs of single layers included."""
    check_needs(stage, tower, methods)
    found = frozenset().union(*stage.tower_extras(*tower.depth).values())
    _check(stage, tower, found, tower.provides_in_layers, methods)
    if (stage.needs or found) and tower.select_feature != "patch":
        raise ValueError(
            f"{stage.name} works on patches, but mm_vision_select_feature is "
            f"{tower.select_feature!r}"
        )


def _check(
    stage: VisionStage,
    tower: Tower,
    needs: frozenset[str],
    known: frozenset[str],
    methods: Iterable[type[Method]],
) -> None:
    for cue in sorted(needs - known):
        what = CUES.get(cue, "which no tower has")
        given, works = ", ".join(sorted(tower.provides)), ", ".join(names_for(tower, methods))
        without = stage.does_without.get(cue)
        raise ValueError(
            f"{stage.name} needs {cue!r} ({what}), which {tower.title} does not provide (it gives "
            f"{given}): {'' if without is None else f'set {without}, '}choose another method"
            f"{works and f' ({works})'}, or a model with another tower"
        )


def names_for(tower: Tower, methods: Iterable[type[Method]]) -> list[str]:
    """Of the methods those that find on the tower what they need, with their defaults."""
    found = []
    for method in methods:
        try:
            check_cues(method().vision, tower)
        except ValueError:
            continue
        found.append(method.name)
    return found


def cues_for(stage: VisionStage, tower: Tower) -> frozenset[str]:
    """The cues that `tower` computes for a method."""
    return stage.needs | (stage.wants & tower.provides)


class OutputMean:
    """The cue "output_mean", added up layer by layer, so that no output is kept for it.

    wanted: layer -> its cues
    """

    def __init__(self, wanted: Mapping[int, frozenset[str]]):
        self.layers = {layer for layer, names in wanted.items() if "output_mean" in names}
        self.total: Tensor | None = None

    def add(self, layer: int, output: Tensor) -> Tensor | None:
        """What a layer gives; the mean comes back from the last one that it is asked of."""
        if layer not in self.layers:
            return None
        if self.total is None:
            self.total = output.detach().to(torch.float32, copy=True)
        else:
            self.total += output.detach()
        return self.total / len(self.layers) if layer == max(self.layers) else None


def fingerprint(images: Tensor) -> Tensor:
    """(B,) integers that depend on the pixels of each crop alone (exact, any device and batch)."""
    # A power of two as factor keeps float32 exact, and no device lacks it.
    pixels = (images.float() * 4096).round().long().flatten(1)
    weights = torch.arange(1, pixels.shape[1] + 1, device=images.device) * 2654435761
    return (pixels * weights).sum(dim=1)
