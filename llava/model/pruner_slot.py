"""The pruning method in use: assigning one checks it against the model and readies both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..image_settings import ImageSettings
from ..pruning import METHODS
from ..pruning.base import Pruner
from ..pruning.cues import check_cues, check_needs
from .model_part import ModelPart


class PrunerSlot(ModelPart):
    """Mixin of models with `config` and `get_vision_tower()`: holds the pruning method."""

    #: where the decoder layers run, if not here, as `llava.engine.VLLMEngine`; set by the loader
    engine: Any = None
    #: reads texts as the language model does, for methods that compare words; set by the loader
    tokenizer: Any = None
    _pruner: Pruner = Pruner()
    _image_changes: dict = {}

    @property
    def pruner(self) -> Pruner:
        """The pruning method in use; assign `build_pruner("none")` to switch pruning off."""
        return self._pruner

    @pruner.setter
    def pruner(self, pruner: Pruner) -> None:
        if not isinstance(pruner, Pruner):
            raise ValueError(f"pruner must come from build_pruner(...), got {pruner!r}")
        if self.engine is not None:
            self.engine.check_method(pruner)
        tower, depth = self.get_vision_tower(), self.config.num_hidden_layers
        if tower is not None:
            check_needs(pruner.vision, tower, METHODS.own.values())
        pruner.attach(self)
        if tower is not None:
            check_cues(pruner.vision, tower, METHODS.own.values())
        pruner = self.checked(pruner)
        pruner.decoder.probe(depth).check(depth)
        self._pruner = pruner
        self.pruner_module = pruner.module
        self.follow_method(pruner)

    def checked(self, pruner: Pruner) -> Pruner:
        """The method with its budget as a number of tokens, where that is the same for all images.

        Raises ValueError where its setting does not fit the model.
        """
        tower, depth = self.get_vision_tower(), self.config.num_hidden_layers
        if tower is None or tower.grid is None:
            pruner.check_depth(depth)
            return pruner
        crops = self.crops_in_budget(pruner)
        if crops > 1 and not pruner.vision.anyres:
            raise ValueError(
                f"{pruner.name} is defined for one crop per image, but this model cuts images "
                f"into up to {crops}"
            )
        pruner.check(tower.num_patches, depth, crops)
        return pruner.with_budget_of(tower.num_patches * crops)

    def follow_method(self, pruner: Pruner) -> None:
        """Called when another method is in use."""
        tower = self.get_vision_tower()
        own = ImageSettings.of_checkpoint(self.config)
        changes = own.changes_of(pruner, 0 if tower is None else tower.image_size)
        # Models may share a config; it tells what the method asks for that was assigned last.
        self._image_changes = self.config.image_changes = changes

    @contextmanager
    def using(self, pruner: Pruner) -> Iterator[None]:
        """Another setting of the method in use, for the time of a block."""
        before = self._pruner
        if pruner is before:  # then it is not ours to put back: others may change it meanwhile
            yield
            return
        self._pruner = self.checked(pruner)
        try:
            yield
        finally:
            self._pruner = before

    @property
    def image_settings(self) -> ImageSettings:
        """How images are cut for the method in use and how their tokens are laid out:
        `process_images(images, image_processor, model.image_settings)`."""
        return ImageSettings.of_checkpoint(self.config).changed(self._image_changes)

    def save_pretrained(self, *args, **kwargs) -> None:
        """Saves the model without the parts of the method in use."""
        if self.engine is not None:
            raise ValueError("a model whose decoder layers run in a server cannot be saved")
        pruner, self.pruner = self.pruner, Pruner()
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.pruner = pruner

    def crops_in_budget(self, pruner: Pruner) -> int:
        """Crops of one image that share `visual_token_num`."""
        settings = ImageSettings.of_checkpoint(self.config)
        if settings.image_aspect_ratio != "anyres":
            return 1
        if pruner.vision.anyres_tiles is not None:
            return 1 + math.prod(pruner.vision.anyres_tiles)
        side = self.get_vision_tower().image_size
        return 1 + max((w // side) * (h // side) for w, h in settings.image_grid_pinpoints)
