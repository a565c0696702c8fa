"""From pixels to the tokens of an image, where images have grids of their own and a merger makes a
token of every block of patches.

A pruning method is called as in `llava.model.encoding`, once for all images with equal grids, and
its budget is a number of tokens by then. A video is as many images as it has pairs of frames, which
share its budget equally; in the prompt it is one. Behind the encoder a token is its block's patches
side by side: what is dropped there is not merged, which changes nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..devices import device_of, moved
from ..pruning.base import Pruner
from ..pruning.cues import cues_for, fingerprint
from ..pruning.precision import full_precision
from ..pruning.stages import VisionStage, fills
from ..pruning.tokens import ImageTokens, VisionTokens
from .encoding import check_one_each
from .image_layout import own_grid_layout
from .model_part import ModelPart
from .multimodal_encoder.qwen2_5_vl_encoder import BlockFeatures
from .multimodal_encoder.qwen2_5_vl_images import blocks_of_pixels, pixels_of_blocks
from .multimodal_encoder.qwen2_5_vl_videos import Video


class UnfitBudget(ValueError):
    """A method does not know its budget for an image of this size."""


@dataclass
class Batch:
    """Images of one grid, or videos of as many pairs of frames of one grid.

    method: the one in use, for each of them
    stage:  what it does to a pair of frames, or to an image
    images: which of the call every row is; a video is `pairs` rows
    vision: their tokens behind the encoder
    """

    method: Pruner
    stage: VisionStage
    images: list[int]
    pairs: int
    vision: VisionTokens


class BlockEncoding(ModelPart):
    """Mixin of models with `get_vision_tower()`, and a pruning method in use."""

    def image_tokens(self, images, image_sizes=None, questions=None) -> list[ImageTokens]:
        """Tokens of every image; images: (h, w, M, values) each, or a `Video`, of which the tower
        and the method see every pair of frames as an image; questions: as in `generate`."""
        check_one_each("questions", questions, len(images))
        lengths = [image_length(image) for image in images]
        if fills(type(self.pruner.vision), VisionStage, "before_tower"):
            images = [self._before_tower(image, number) for number, image in enumerate(images)]
        batches = self._encoded(images, questions)
        tokens: dict[int, ImageTokens] = {}
        home = device_of(self.get_input_embeddings())
        for batch, vision in zip(batches, self._merged(batches), strict=True):
            with full_precision(vision.features.device):
                vision = batch.stage.after_projector(vision)
            vision = vision if vision.features.device == home else moved(vision, home)
            laid_out: dict[int, ImageTokens] = {}
            for start in range(0, len(batch.images), batch.pairs):
                number, rows = batch.images[start], slice(start, start + batch.pairs)
                image = own_grid_layout(vision, rows, lengths[number], self._times(images[number]))
                extras = {
                    name: one_for_all(name, values[rows], number)
                    for name, values in vision.image_extras.items()
                }
                laid_out[number] = replace(image, image_extras=extras)
            with full_precision(home):
                whole = batch.method.vision.after_layouts(list(laid_out.values()))
                whole = [self.pruner.decoder.before_prompt(image) for image in whole]
            tokens |= zip(laid_out, whole, strict=True)
        return [tokens[number] for number in range(len(images))]

    def _encoded(self, images: list[Tensor | Video], questions: list[str] | None) -> list[Batch]:
        """What tower and method make of the images, and of the pairs of frames of videos."""
        stage, tower = self.pruner.vision, self.get_vision_tower()
        parts, owner, pairs = [], [], []
        for number, image in enumerate(images):
            own = parts_of(image)
            parts += own
            owner += [number] * len(own)
            pairs += [len(own)] * len(own)
        cues, last = cues_for(stage, tower), tower.depth[1]
        wanted = dict(stage.tower_extras(*tower.depth))
        wanted[last] = wanted.get(last, frozenset()) | (cues & tower.provides_in_layers)
        batches = []
        for group in tower.features(parts, wanted, pairs):
            numbers, count = [owner[part] for part in group.images], pairs[group.images[0]]
            method = self._fitted(group.grid, count, numbers[0])
            vision = group_tokens(group, last, tower.config.num_heads)
            if "fingerprint" in cues:
                pixels = torch.stack([parts[part] for part in group.images])
                vision.fingerprint = fingerprint(pixels.to(vision.features.device))
            if stage.reads_question and questions is not None:
                vision.questions = [questions[number] for number in numbers]
            part = method.for_part(count).vision
            with full_precision(vision.features.device):
                vision = part.after_encoder(vision)
            batches.append(Batch(method, part, numbers, count, vision))
        return batches

    def image_extent(self, image: Tensor | Video) -> int:
        """Positions that an image or a video takes without a method."""
        return max(*image.shape[-4:-2], (self._times(image) or [0])[-1] + 1)

    def _times(self, image: Tensor | Video) -> list[int] | None:
        """Positions in time of the pairs of frames of a video; None: it is an image."""
        if not isinstance(image, Video):
            return None
        return image.times(self.get_vision_tower().config.tokens_per_second)

    def _merged(self, batches: list[Batch]) -> list[VisionTokens]:
        """The tokens of every batch behind the merger.

        It is called once, whatever grids there are: processes that train together and hold its
        weights in pieces wait for each other at every call.
        """
        merger = self.get_vision_tower().merger
        device, groups = device_of(merger), [batch.vision for batch in batches]
        groups = [g if g.features.device == device else moved(g, device) for g in groups]

        def project(features: Tensor) -> Tensor:
            """(..., M * C) -> (..., D)"""
            return merger(features.unflatten(-1, (groups[0].block, -1)))

        rows = [group.features.flatten(0, -2) for group in groups]
        merged = project(rows[0] if len(rows) == 1 else torch.cat(rows))
        merged = merged.split([len(part) for part in rows])
        pairs = zip(groups, merged, strict=True)
        return [
            replace(group, features=part.unflatten(0, group.features.shape[:-1]), project=project)
            for group, part in pairs
        ]

    def _fitted(self, grid: tuple[int, int], pairs: int, number: int) -> Pruner:
        """The method for images of this grid, of which `number` is the first, or for videos of
        several pairs of frames of this grid."""
        count = grid[0] * grid[1]
        own = self.pruner.with_budget_of(count * pairs, pairs)
        try:
            own.check(count, self.config.num_hidden_layers, pairs)
        except ValueError as error:
            what = f"image {number}, of" if pairs == 1 else f"video {number}, of {pairs} x"
            raise UnfitBudget(f"{what} {grid[0]} x {grid[1]} tokens: {error}") from error
        return own

    def _before_tower(self, image: Tensor | Video, number: int) -> Tensor | Video:
        """An image, or all frames of a video, as a method leaves them to the tower."""
        parts, config = parts_of(image), self.get_vision_tower().config
        height, width = parts[0].shape[:2]
        own = self._fitted((height, width), len(parts), number).for_part(len(parts))
        merge, patch, frames = config.spatial_merge_size, config.patch_size, 1
        if isinstance(image, Video):
            frames = config.temporal_patch_size
        pixels = torch.cat([pixels_of_blocks(part, merge, patch, frames) for part in parts])
        changed = own.vision.before_tower(pixels, merge * patch)
        if changed is pixels:
            return image
        smaller = [blocks_of_pixels(part, merge, patch) for part in changed.split(frames)]
        if isinstance(image, Video):
            return replace(image, pixels=torch.stack(smaller))
        return smaller[0]


def parts_of(image: Tensor | Video) -> list[Tensor]:
    """What the tower sees as an image each, (h, w, M, values): the pairs of frames of a video."""
    return list(image.pixels) if isinstance(image, Video) else [image]


def image_length(image: Tensor | Video | ImageTokens) -> int:
    """Tokens that an image or a video takes in a prompt without a method.

    Raises ValueError for what is not prepared.
    """
    if isinstance(image, ImageTokens):
        return image.length
    if not isinstance(image, (Tensor, Video)):
        raise ValueError(
            f"images must be what the image processor of the model makes of them, not "
            f"{type(image).__name__}"
        )
    return math.prod(image.shape[:-2])


def one_for_all(name: str, values: list, number: int):
    """What a method left for an image, from what it left for each pair of frames of a video."""
    if len(set(values)) > 1:
        raise ValueError(
            f"image_extras[{name!r}] differs between the pairs of frames of video {number}: a "
            "number of its own for each image has no meaning for videos"
        )
    return values[0]


def group_tokens(group: BlockFeatures, last: int, num_heads: int) -> VisionTokens:
    """Images of one grid as a method sees them; last: the layer of the features."""
    features = group.features
    batch, count, block, _ = features.shape
    places = torch.arange(count, device=features.device).expand(batch, -1)
    own = group.cues.get(last, {})
    return VisionTokens(
        features=features.flatten(2),
        positions=places,
        all_patches=places,
        grid=group.grid,
        image_index=torch.arange(batch, device=features.device),
        block=block,
        num_heads=num_heads,
        salience=own.get("salience"),
        keys=own.get("keys"),
        layers=group.cues,
    )
