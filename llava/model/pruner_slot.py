"""The pruning method in use: assigning one checks it against the model and readies both."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from contextlib import contextmanager

from ..mm_utils import get_anyres_image_grid_shape
from ..pruning.base import Pruner


class PrunerSlot:
    """Mixin of models with `config` and `get_vision_tower()`: holds the pruning method."""

    _pruner: Pruner = Pruner()
    #: config values of the checkpoint that the method in use replaces
    _native_anyres: dict = {}

    @property
    def pruner(self) -> Pruner:
        """The pruning method in use; assign `build_pruner("none")` to switch pruning off."""
        return self._pruner

    @pruner.setter
    def pruner(self, pruner: Pruner) -> None:
        if not isinstance(pruner, Pruner):
            raise ValueError(f"pruner must come from build_pruner(...), got {pruner!r}")
        pruner.attach_model(self)
        tower = self.get_vision_tower()
        if tower is not None:
            crops = self.crops_in_budget(pruner)
            if crops > 1 and not pruner.anyres:
                raise ValueError(
                    f"{pruner.name} is defined for one crop per image, but this model cuts images "
                    f"into up to {crops}"
                )
            pruner.check(tower.num_patches, self.config.num_hidden_layers, crops)
            wants_patches = pruner.needs or pruner.tower_extras(*tower.depth)
            if wants_patches and tower.select_feature != "patch":
                raise ValueError(
                    f"{pruner!r} works on patches, but mm_vision_select_feature is "
                    f"{tower.select_feature!r}"
                )
        pruner.attach(tower)
        self._prepare_config(pruner)
        self._pruner = pruner
        self.pruner_module = pruner.module

    @contextmanager
    def using(self, pruner: Pruner) -> Iterator[None]:
        """Another setting of the method in use, for the time of a block."""
        before = self._pruner
        if pruner is before:  # then it is not ours to put back: others may change it meanwhile
            yield
            return
        tower = self.get_vision_tower()
        if tower is not None:
            crops = self.crops_in_budget(pruner)
            pruner.check(tower.num_patches, self.config.num_hidden_layers, crops)
        self._pruner = pruner
        try:
            yield
        finally:
            self._pruner = before

    def _prepare_config(self, pruner: Pruner) -> None:
        """Makes the config say how images are cut now: `process_images` reads it there."""
        config = self.config
        for key, value in self._native_anyres.items():  # undo what the previous method asked for
            if value is None:
                delattr(config, key)
            else:
                setattr(config, key, value)
        self._native_anyres = {}
        tower = self.get_vision_tower()
        if getattr(config, "image_aspect_ratio", None) != "anyres" or tower is None:
            return
        wanted = dict(pruner.anyres_config)
        if pruner.anyres_tiles is not None:
            merge = getattr(config, "mm_patch_merge_type", "flat")
            wanted["mm_patch_merge_type"] = merge.replace("_unpad", "")
            wanted["image_grid_pinpoints"] = [[tower.image_size * n for n in pruner.anyres_tiles]]
        self._native_anyres = {key: getattr(config, key, None) for key in wanted}
        for key, value in wanted.items():
            setattr(config, key, value)

    def save_pretrained(self, *args, **kwargs) -> None:
        """Saves the plain model, whatever pruning method is in use."""
        pruner, self.pruner = self.pruner, Pruner()
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.pruner = pruner

    def crops_in_budget(self, pruner: Pruner) -> int:
        """Crops of one image that share `visual_token_num`."""
        if getattr(self.config, "image_aspect_ratio", None) != "anyres":
            return 1
        if pruner.anyres_tiles is not None:
            return 1 + math.prod(pruner.anyres_tiles)
        pinpoints = self._native_anyres.get(
            "image_grid_pinpoints", self.config.image_grid_pinpoints
        )
        if isinstance(pinpoints, str):
            pinpoints = ast.literal_eval(pinpoints)
        side = self.get_vision_tower().image_size
        tiles = (get_anyres_image_grid_shape((w, h), [(w, h)], side) for w, h in pinpoints)
        return 1 + max(math.prod(shape) for shape in tiles)
