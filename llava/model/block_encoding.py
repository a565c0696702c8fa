"""From pixels to the tokens of an image, where images have grids of their own and a merger makes a
token of every block of patches.

A pruning method is called as in `llava.model.encoding`, once for all images with equal grids, and
its budget is a number of tokens by then. Behind the encoder a token is its block's patches side by
side: what is dropped there is not merged, which changes nothing else.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..devices import device_of, moved
from ..pruning.base import Pruner
from ..pruning.cues import cues_for, fingerprint
from ..pruning.stages import VisionStage, fills
from ..pruning.tokens import ImageTokens, VisionTokens
from .image_layout import own_grid_layout
from .multimodal_encoder.qwen2_5_vl_encoder import BlockFeatures
from .multimodal_encoder.qwen2_5_vl_images import blocks_of_pixels, pixels_of_blocks


class BlockEncoding:
    """Mixin of models with `get_vision_tower()`, and a pruning method in use."""

    def image_tokens(self, images, image_sizes=None, questions=None) -> list[ImageTokens]:
        """Tokens of every image; images: (h, w, M, values) each, questions: as in `generate`."""
        if questions is not None and len(questions) != len(images):
            raise ValueError(f"{len(questions)} questions for {len(images)} images: give one each")
        pruner, tower = self.pruner, self.get_vision_tower()
        stage, (_, last) = pruner.vision, tower.depth
        lengths = [image.shape[0] * image.shape[1] for image in images]
        if fills(type(stage), VisionStage, "before_tower"):
            images = [self._before_tower(image, number) for number, image in enumerate(images)]
        cues = cues_for(stage, tower)
        wanted = dict(stage.tower_extras(*tower.depth))
        wanted[last] = wanted.get(last, frozenset()) | (cues & tower.provides_in_layers)
        methods, groups, parts = [], [], []
        for group in tower.features(images, wanted):
            own = self._fitted(group.grid, group.images[0])
            vision = group_tokens(group, last, tower.config.num_heads)
            if "fingerprint" in cues:
                pixels = torch.stack([images[number] for number in group.images])
                vision.fingerprint = fingerprint(pixels.to(vision.features.device))
            if stage.reads_question and questions is not None:
                vision.questions = [questions[number] for number in group.images]
            methods.append(own)
            groups.append(group.images)
            parts.append(own.vision.after_encoder(vision))
        tokens: dict[int, ImageTokens] = {}
        for own, numbers, vision in zip(methods, groups, self._merged(parts), strict=True):
            vision = own.vision.after_projector(vision)
            home = device_of(self.get_input_embeddings())
            vision = vision if vision.features.device == home else moved(vision, home)
            for place, number in enumerate(numbers):
                image = own_grid_layout(vision, place, lengths[number])
                extras = {name: values[place] for name, values in vision.image_extras.items()}
                image = own.vision.after_layout(replace(image, image_extras=extras))
                tokens[number] = pruner.decoder.before_prompt(image)
        return [tokens[number] for number in range(len(images))]

    def image_extent(self, pixels: Tensor) -> int:
        """Positions that an image takes without a method; pixels: (h, w, M, values)."""
        return max(pixels.shape[:2])

    def _merged(self, groups: list[VisionTokens]) -> list[VisionTokens]:
        """Groups of images behind the merger.

        It is called once, whatever grids there are: processes that train together and hold its
        weights in pieces wait for each other at every call.
        """
        merger = self.get_vision_tower().merger
        device = device_of(merger)
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

    def _fitted(self, grid: tuple[int, int], number: int) -> Pruner:
        """The method for images of this grid, of which `number` is the first."""
        count = grid[0] * grid[1]
        own = self.pruner.with_budget_of(count)
        try:
            own.check(count, self.config.num_hidden_layers)
        except ValueError as error:
            raise ValueError(f"image {number}, of {grid[0]} x {grid[1]} tokens: {error}") from error
        return own

    def _before_tower(self, image: Tensor, number: int) -> Tensor:
        """An image as a method leaves it to the tower."""
        stage = self._fitted(tuple(image.shape[:2]), number).vision
        config = self.get_vision_tower().config
        merge, patch = config.spatial_merge_size, config.patch_size
        pixels = pixels_of_blocks(image, merge, patch)[None]
        changed = stage.before_tower(pixels, merge * patch)
        return image if changed is pixels else blocks_of_pixels(changed[0], merge, patch)


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
