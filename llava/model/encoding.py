"""From pixels to the tokens of an image: vision tower, projector, layout.

A pruning method is called behind the encoder, behind the projector and behind the layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..devices import device_of, moved
from ..image_settings import ImageSettings
from ..mm_utils import get_anyres_image_grid_shape
from ..pruning.cues import cues_for
from ..pruning.precision import full_precision
from ..pruning.required import required
from ..pruning.tokens import ImageTokens, VisionTokens
from .image_layout import flat_layout, image_layout, spatial_layout, with_newline
from .model_part import ModelPart
from .multimodal_encoder.clip_encoder import CLIPVisionTower
from .patches import check_tower, refuse, replacement


class ImageEncoding(ModelPart):
    """Mixin of models with `get_model()`, `get_vision_tower()`, and a pruning method in use."""

    def encode_images(self, images: Tensor) -> Tensor:
        """Projected, pruned features (B, T, D) of crops (B, 3, S, S)."""
        return self.encode_vision(images).features

    def encode_vision(
        self,
        crops: Tensor,
        image_index: Tensor | None = None,
        questions: list[str] | None = None,
        arrangements: list[tuple] | None = None,
    ) -> VisionTokens:
        """Tokens of crops (B, 3, S, S) as they enter the language model.

        image_index:  (B,) image each crop belongs to (default: one crop per image)
        arrangements: per image (crops, tiles, size), see `image_layout`
        """
        stage, tower = self.pruner.vision, self.get_vision_tower()
        if isinstance(tower, CLIPVisionTower):
            check_tower(tower, TOWER_AS_IT_CAME)
        elif not hasattr(tower, "tokens"):
            raise ValueError(
                f"the vision tower is a {type(tower).__name__}, whose forward is not called here: "
                "derive it from CLIPVisionTower, or give it what "
                "llava.pruning.interfaces.VisionTower names"
            )
        budget = self.crops_in_budget(self.pruner)
        if image_index is None:
            image_index = torch.arange(crops.shape[0], device=crops.device)
        vision = tower.tokens(crops, cues_for(stage, tower), stage, budget, image_index)
        vision.image_index = image_index.to(vision.features.device)
        vision.questions = questions if stage.reads_question else None
        if arrangements is not None:
            vision.layouts = [
                image_layout(crops, tiles, vision.grid, size) for crops, tiles, size in arrangements
            ]
        with full_precision(crops.device):
            vision = stage.after_encoder(vision)
        projector = self.get_model().mm_projector
        weight = next(projector.parameters(), None)
        if weight is not None and (device := device_of(projector)) != vision.features.device:
            vision = moved(vision, device)
        features = vision.features if weight is None else vision.features.to(weight.dtype)
        vision.features, vision.project = projector(features), projector
        with full_precision(vision.features.device):
            vision = stage.after_projector(vision)
        home = device_of(self.get_input_embeddings())
        return vision if vision.features.device == home else moved(vision, home)

    def image_tokens(self, images, image_sizes=None, questions=None) -> list[ImageTokens]:
        """Tokens of every image, laid out for the prompt; arguments as in `generate`."""
        if replacement(self, "encode_images", AS_IT_CAME) is not None:
            refuse("encode_images")
        check_images(images, image_sizes, questions)
        tiled = not isinstance(images, Tensor) or images.ndim == 5
        parts = [image if image.ndim == 4 else image[None] for image in images]
        counts = [len(part) for part in parts]
        crops = torch.cat(parts) if tiled else images
        owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        settings, plans, start = self.image_settings, [], 0
        for number, count in enumerate(counts):
            size = None if image_sizes is None else image_sizes[number]
            plans.append(self._arrange(settings, slice(start, start + count), tiled, size, number))
            start += count
        vision = self.encode_vision(crops, owner.to(crops.device), questions, plans)
        unpads = tiled and "unpad" in settings.mm_patch_merge_type
        newline = self.get_model().image_newline if unpads else None
        layouts = required(vision.layouts, "how the crops of an image stand to one another is lost")
        laid_out = [self._layout(vision, layout, newline) for layout in layouts]
        for number, image in enumerate(laid_out):
            image.image_extras = {k: own[number] for k, own in vision.image_extras.items()}
        with full_precision(vision.features.device):
            whole = self.pruner.vision.after_layouts(laid_out)
            return [self.pruner.decoder.before_prompt(image) for image in whole]

    def _arrange(
        self, settings: ImageSettings, crops: slice, tiled: bool, image_size, number: int
    ) -> tuple:
        """(crops, tiles, size) of image `number` as `image_layout` takes them."""
        merge = settings.mm_patch_merge_type
        if merge == "flat" or not tiled:
            return crops, None, None
        if not merge.startswith("spatial"):
            raise ValueError(
                f"Unexpected mm_patch_merge_type: {merge!r}, choose flat or spatial..."
            )
        count, tower = crops.stop - crops.start, self.get_vision_tower()
        if count == 1:
            return crops, None, None
        if tower.select_feature != "patch":
            raise ValueError(
                f"mm_patch_merge_type {merge!r} needs mm_vision_select_feature 'patch'"
            )
        if settings.image_aspect_ratio != "anyres":
            raise ValueError(
                f"mm_patch_merge_type {merge!r} with several crops needs "
                "image_aspect_ratio 'anyres'"
            )
        if image_size is None:
            raise ValueError(
                f"image {number} has {count} crops: pass its (width, height) in image_sizes"
            )
        pinpoints, selection = settings.image_grid_pinpoints, settings.anyres_selection
        tiles = get_anyres_image_grid_shape(image_size, pinpoints, tower.image_size, selection)
        if count != 1 + math.prod(tiles):
            raise ValueError(
                f"image {number} has {count} crops, but {pinpoints} cuts size {tuple(image_size)} "
                f"into 1 + {tiles[0]} x {tiles[1]}: after choosing the pruning method, prepare "
                "images with process_images(images, image_processor, model.image_settings)"
            )
        return crops, tiles, image_size if "unpad" in merge else None

    def _layout(self, vision: VisionTokens, layout, newline: Tensor | None) -> ImageTokens:
        """Tokens of one image in their order, with `newline` (D,) where rows end."""
        class_token = self.get_vision_tower().select_feature == "cls_patch"
        num_patches = math.prod(vision.grid) + class_token
        newline = None if newline is None else newline.to(vision.features.device)
        if layout.mosaic is not None:
            return spatial_layout(vision, layout, num_patches, newline)
        flat = flat_layout(vision, layout.crops, num_patches)
        return flat if newline is None else with_newline(flat, newline)


def check_images(images, image_sizes, questions) -> None:
    """Raises ValueError unless images are tensors, and as many as the sizes and questions given."""
    given = (images,) if isinstance(images, Tensor) else images
    if odd := [type(image).__name__ for image in given if not isinstance(image, Tensor)]:
        raise ValueError(
            f"images must be tensors, as process_images makes of pictures, not {odd[0]}"
        )
    check_one_each("questions", questions, len(images))
    check_one_each("image_sizes", image_sizes, len(images))


def check_one_each(name: str, given: Sequence | None, count: int) -> None:
    """Raises ValueError where something is given, but not for each of `count` images."""
    if given is not None and len(given) != count:
        raise ValueError(f"{len(given)} {name} for {count} images: give one each")


#: functions that other packages replace, as they came
AS_IT_CAME = ImageEncoding.encode_images
TOWER_AS_IT_CAME = CLIPVisionTower.forward
