"""What a method would cost if choosing were free: its own token counts, the first tokens kept.

The counts come from watching the method run once, not from what it is called or says about itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from llava.eval.efficiency.wrapping import wrapped
from llava.pruning import (
    DecoderStage,
    ImageTokens,
    Prefill,
    Pruner,
    TowerTokens,
    VisionStage,
    VisionTokens,
)
from llava.pruning.per_token import at
from llava.pruning.stages import filled_hooks

Counts = tuple[int, ...]


@dataclass
class Schedule:
    """How many tokens a method let pass on one workload, at every stage where it changed them.

    size:      (height, width) in pixels of what entered the tower; None: as it was
    tower:     tower layer -> patches of each crop that entered it
    encoder:   tokens of each crop that entered the projector; None: all
    projector: tokens of each crop after it; None: all
    layout:    tokens of an image before the hook -> after it; where images differ, the most
    layers:    decoder layer -> visual tokens of each prompt that entered it
    renumber:  those of `layers` at which positions were counted anew
    """

    size: tuple[int, int] | None = None
    tower: dict[int, Counts] = field(default_factory=dict)
    encoder: Counts | None = None
    projector: Counts | None = None
    layout: dict[int, int] = field(default_factory=dict)
    layers: dict[int, Counts] = field(default_factory=dict)
    renumber: set[int] = field(default_factory=set)

    def before_tower(self, result: Tensor, images: Tensor, *_, **__) -> None:
        if result.shape != images.shape:
            self.size = tuple(result.shape[-2:])

    def before_tower_layer(self, result: TowerTokens, index: int, tokens: TowerTokens) -> None:
        if result is not tokens:
            self.tower[index] = _lengths(result.positions, result.valid)

    def after_encoder(self, result: VisionTokens, vision: VisionTokens) -> None:
        self.encoder = self._changed(result, vision)

    def after_projector(self, result: VisionTokens, vision: VisionTokens) -> None:
        self.projector = self._changed(result, vision)

    @staticmethod
    def _changed(result: VisionTokens, vision: VisionTokens) -> Counts | None:
        after = _lengths(result.positions, result.valid)
        return None if after == _lengths(vision.positions, vision.valid) else after

    def after_layout(self, result: ImageTokens, image: ImageTokens) -> None:
        before, after = len(image.patches), len(result.patches)
        if after != before:
            self.layout[before] = max(after, self.layout.get(before, 0))

    def after_layouts(self, results: list[ImageTokens], images: list[ImageTokens]) -> None:
        for result, image in zip(results, images, strict=True):
            self.after_layout(result, image)

    def before_layer(self, result: Prefill, index: int, prefill: Prefill) -> None:
        if result.index is prefill.index:
            return
        before, after = (tuple(x.is_visual.sum(dim=1).tolist()) for x in (prefill, result))
        if after == before:  # a token of the method's own came in
            return
        self.layers[index] = after
        if (end_of_prompt(result) != end_of_prompt(prefill)).any():
            self.renumber.add(index)


def end_of_prompt(prefill: Prefill) -> Tensor:
    """(B, 1) position of the last token of every prompt, behind which a method may have tokens of
    its own; (B, 1, A) where positions have A axes."""
    return at(prefill.index.argmax(dim=1, keepdim=True))(prefill.position_ids, 1)


@contextmanager
def watch_schedule(pruner: Pruner) -> Iterator[Schedule]:
    """Fills the schedule while the model runs with `pruner` inside the block."""
    schedule = Schedule()

    def noted(hook, note):
        def call(stage, *args, **kwargs):
            result = hook(stage, *args, **kwargs)
            note(result, *args, **kwargs)
            return result

        return call

    hooks = filled_hooks(pruner.vision, pruner.decoder)
    known = [(stage, name) for stage, name in hooks if hasattr(schedule, name)]
    with wrapped(
        [(stage, name, partial(noted, note=getattr(schedule, name))) for stage, name in known]
    ):
        yield schedule


class Oracle(VisionStage, DecoderStage, Pruner):
    """Keeps the first tokens wherever `schedule` says that tokens go, and looks at nothing.

    like: the method whose positions, image layout and cache cuts it shares
    """

    name = "oracle"

    def __init__(self, schedule: Schedule, like: Pruner | None = None):
        self.schedule, self.like = schedule, like or Pruner()
        vision = self.like.vision
        self.position_policy = vision.position_policy
        self.anyres_tiles, self.anyres_config = vision.anyres_tiles, vision.anyres_config

    @classmethod
    def constant(cls, tokens: int, crops: int) -> Oracle:
        """As many tokens of each of `crops` crops, from the projector on."""
        return cls(Schedule(encoder=(tokens,) * crops))

    def does_the_same_as(self, other: Oracle, tiled: bool) -> bool:
        """Whether measuring both would measure one thing twice; tiled: images are cut into crops,
        so that it matters how."""
        return self._facts(tiled) == other._facts(tiled)

    def _facts(self, tiled: bool) -> tuple:
        tiles = (self.anyres_tiles, self.anyres_config) if tiled else None
        kind = type(self.like.decoder)
        cuts = kind.pruned_caches, kind.blind_cuts, kind.acts_behind
        return self.schedule, self.position_policy, tiles, cuts

    def before_tower(self, images: Tensor, patch_size: int, crops: int = 1) -> Tensor:
        if self.schedule.size is None:
            return images
        height, width = self.schedule.size
        return images[..., :height, :width]

    def after_encoder(self, vision: VisionTokens) -> VisionTokens:
        return _first(vision, self.schedule.encoder)

    def after_projector(self, vision: VisionTokens) -> VisionTokens:
        return _first(vision, self.schedule.projector)

    def after_layout(self, image: ImageTokens) -> ImageTokens:
        size = len(image.patches)
        count = self.schedule.layout.get(size, size)
        return image if count == size else image.keep(slice(count))

    def before_layer(self, index: int, prefill: Prefill) -> Prefill:
        counts = self.schedule.layers.get(index)
        if counts is None:
            return prefill
        visual = prefill.is_visual
        kept = torch.tensor(counts, device=visual.device)[:, None]
        mask = ~visual | (visual.cumsum(dim=1) <= kept)
        return prefill.keep(mask, renumber=index in self.schedule.renumber)

    def blind_cuts(self, num_layers: int) -> tuple[int, ...]:
        return self.like.decoder.blind_cuts(num_layers)

    def acts_behind(self, num_layers: int) -> bool:
        return self.like.decoder.acts_behind(num_layers)

    def pruned_caches(self, index: int, num_layers: int) -> range:
        return self.like.decoder.pruned_caches(index, num_layers)


class TowerOracle(Oracle):
    """Between tower layers as well."""

    def before_tower_layer(self, index: int, tokens: TowerTokens) -> TowerTokens:
        counts = self.schedule.tower.get(index)
        if counts is None:
            return tokens
        return replace(
            tokens,
            hidden_states=tokens.hidden_states[:, : 1 + max(counts)],
            positions=tokens.positions[:, : max(counts)],
            valid=_valid(counts, tokens.positions.device),
        )


def imitation(schedule: Schedule, like: Pruner | None = None) -> Oracle:
    """The oracle of a schedule. Only a tower whose tokens can change between its layers takes one
    that changes them."""
    return (TowerOracle if schedule.tower else Oracle)(schedule, like)


def _first(vision: VisionTokens, counts: Counts | None) -> VisionTokens:
    if counts is None:
        return vision
    most = max(counts)
    return replace(
        vision,
        features=vision.features[:, :most],
        positions=vision.positions[:, :most],
        valid=_valid(counts, vision.positions.device),
        extras={},
    )


def _valid(counts: Counts, device) -> Tensor | None:
    """(B, most) False on padding; None where all counts are equal."""
    if min(counts) == max(counts):
        return None
    return torch.arange(max(counts), device=device) < torch.tensor(counts, device=device)[:, None]


def _lengths(places: Tensor, valid: Tensor | None) -> Counts:
    if valid is None:
        return (places.shape[1],) * places.shape[0]
    return tuple(valid.sum(dim=1).tolist())
