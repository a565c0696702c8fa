"""What the override `pruning` asks for: the method, checked, and how many tokens it always keeps.

A server lays out a prompt before it sees pixels, so that the number of tokens of an image has to
follow from the settings alone. Methods are judged by what they declare and do, never by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..pruning import Pruner, build_pruner
from ..pruning.apart import check_bias, reason_apart
from ..pruning.cues import check_cues
from ..pruning.stages import VisionStage, fills
from ..pruning.tokens import MERGED, ImageTokens, VisionTokens
from .tower import TowerShape

OVERRIDE = "pruning"
METHOD = "method"
#: seeds of the made-up images that a method is tried with; None: one without any contrast
TRIALS = (0, 1, 2, None)
WIDTH_BEHIND = 8  # of the made-up projector


@dataclass(frozen=True)
class PruningPlan:
    """A method for the images of a server.

    pruner: the method, its budget as a number of tokens
    count:  tokens of every image
    """

    pruner: Pruner
    count: int


def check_unpruned(config) -> None:
    """Raises ValueError where the config of a model that is never pruned holds the override."""
    if getattr(config, OVERRIDE, None) is not None:
        kind = getattr(config, "model_type", type(config).__name__)
        raise ValueError(
            f"the override {OVERRIDE!r} prunes LLaVA-1.5 alone, and this model is {kind}: leave it "
            "out, or let llava prune and vLLM run the language model (docs/Serving.md)"
        )


def plan_of(values: object, shape: TowerShape, num_layers: int) -> PruningPlan | None:
    """The plan that an override asks for; None: none does.

    values:     {"method": NAME, OPTION: VALUE, ...}; None: the override is not there
    num_layers: of the decoder
    Raises ValueError with the reason where a method cannot be used in a server.
    """
    if values is None:
        return None
    if not isinstance(values, Mapping) or not isinstance(values.get(METHOD), str):
        raise ValueError(
            'pruning must look like {"method": NAME, "visual_token_num": 64}, not '
            f"{values!r:.100}"
        )
    options = {key: value for key, value in values.items() if key != METHOD}
    pruner = build_pruner(values[METHOD], **options)
    if pruner.name == Pruner.name:
        return None
    check_method(pruner, shape)
    patches = shape.grid[0] * shape.grid[1]
    pruner.check(patches, num_layers)
    pruner = pruner.with_budget_of(patches)
    return PruningPlan(pruner, fixed_count(pruner, shape))


def check_method(pruner: Pruner, shape: TowerShape) -> None:
    """Raises ValueError where a method wants what a server does not do, or does not have."""
    stage = pruner.vision
    if reason := reason_apart(pruner):
        raise ValueError(reason)
    if stage.reads_question:
        raise ValueError(f"{pruner.name} reads the question, which vLLM's encoder is not given")
    if fills(type(stage), VisionStage, "before_tower"):
        raise ValueError(f"{pruner.name} changes images before the tower, which is vLLM's own here")
    check_cues(stage, shape)
    if late := [layer for layer in stage.tower_extras(*shape.depth) if layer > shape.depth[1]]:
        raise ValueError(
            f"{pruner.name} asks layer {max(late)} of the tower, but vLLM loads none behind layer "
            f"{shape.depth[1]}, whose output are the features"
        )


def fixed_count(pruner: Pruner, shape: TowerShape) -> int:
    """Tokens that a method keeps of an image. Raises ValueError where that depends on the image."""
    found = {len(prune(pruner, made_up(pruner, shape, seed), shrink)[0]) for seed in TRIALS}
    if len(found) > 1:
        raise ValueError(
            f"{pruner!r} keeps {min(found)} to {max(found)} tokens, as an image needs them, but "
            "vLLM has to know their number before it sees an image: give it a fixed budget "
            "(visual_token_num), or choose a method that has one"
        )
    return found.pop()


def prune(pruner: Pruner, vision: VisionTokens, project: Callable) -> list[Tensor]:
    """Embeddings (n, D) of every image (one crop each) of a batch, as a method leaves them."""
    stage, size = pruner.vision, vision.features.shape[1]
    vision = stage.after_encoder(vision)
    vision.features, vision.project = project(vision.features), project
    vision = stage.after_projector(vision)
    check_bias(vision.extras)
    places = vision.positions
    merged = vision.extras.get(MERGED)
    patches = places if merged is None else places.masked_fill(merged, -1)
    images = [
        ImageTokens(
            embeds=vision.features[row, :count],
            patches=patches[row, :count],
            offsets=places[row, :count],
            length=size,
            blocks=(vision.grid,),
            grid=vision.grid,
        )
        for row, count in enumerate(vision.crop_counts())
    ]
    return [image.embeds for image in stage.after_layouts(images)]


def made_up(pruner: Pruner, shape: TowerShape, seed: int | None) -> VisionTokens:
    """Tokens of one image that is not there, with all cues that a method asks for."""
    draw = torch.Generator().manual_seed(seed or 0)
    states = torch.randn(1, 1 + shape.grid[0] * shape.grid[1], shape.hidden_size, generator=draw)
    if seed is None:
        states = torch.ones_like(states)
    pixels = states.new_full((1, 3, 2, 2), float(seed or 0))
    return shape.tokens(pixels, states, lambda number: (states, states), pruner.vision)


def shrink(features: Tensor) -> Tensor:
    """A projector that costs nothing."""
    return features[..., :WIDTH_BEHIND]
