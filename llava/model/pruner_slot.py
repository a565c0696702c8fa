"""The pruning method in use: assigning one checks it against the model and readies both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast
from weakref import ref

from ..image_settings import ImageSettings
from ..pruning import METHODS
from ..pruning.base import Pruner
from ..pruning.cues import check_cues, check_needs
from ..weight_files import share_files
from .checkpoint import any_generation_config
from .model_part import ModelPart

Call = TypeVar("Call", bound=Callable)


class InUse(NamedTuple):
    """A method, and what it changes of how images are cut."""

    pruner: Pruner = Pruner()
    image_changes: dict = {}


#: model -> what the calls that run in this thread go by
IN_CALLS: ContextVar[Mapping[ref, InUse]] = ContextVar("IN_CALLS", default=MappingProxyType({}))


def in_one_method(call: Call) -> Call:
    """A function of a model that keeps the method it began with: one that is assigned meanwhile
    counts from the next call."""

    @wraps(call)
    def kept(self, *args, **kwargs):
        if ref(self) in IN_CALLS.get():
            return call(self, *args, **kwargs)
        with self.using():
            return call(self, *args, **kwargs)

    return cast(Call, kept)


class PrunerSlot(ModelPart):
    """Mixin of models with `config` and `get_vision_tower()`: holds the pruning method."""

    #: where the decoder layers run, if not here, as `llava.engine.VLLMEngine`; set by the loader
    engine: Any = None
    #: reads texts as the language model does, for methods that compare words; set by the loader
    tokenizer: Any = None
    _assigned = InUse()

    @property
    def in_use(self) -> InUse:
        """What was assigned; during a call, in its thread, what the call goes by."""
        return IN_CALLS.get().get(ref(self)) or self._assigned

    @property
    def pruner(self) -> Pruner:
        """The pruning method in use; assign `build_pruner("none")` to switch pruning off."""
        return self.in_use.pruner

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
        self._assigned = InUse(pruner, self.follow_method(pruner))
        self.pruner_module = pruner.module

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

    def follow_method(self, pruner: Pruner) -> dict:
        """Called when another method is assigned: what it changes of how images are cut."""
        tower = self.get_vision_tower()
        own = ImageSettings.of_checkpoint(self.config)
        changes = own.changes_of(pruner, 0 if tower is None else tower.image_size)
        merge, trained = own.changed(changes).mm_patch_merge_type, own.mm_patch_merge_type
        ends = tower is None or "unpad" in trained or hasattr(self.get_model(), "image_newline")
        if "unpad" in merge and not ends:
            raise ValueError(
                f"{pruner.name} needs the newline of mm_patch_merge_type {merge!r}, and this model "
                f"was trained with {trained!r}, without one: choose another method"
            )
        # Models may share a config; it tells what the method asks for that was assigned last.
        self.config.image_changes = changes
        return changes

    @contextmanager
    def using(self, pruner: Pruner | None = None) -> Iterator[None]:
        """Another setting of the method in use for the time of a block, or (None) that method,
        whatever is assigned meanwhile. Other threads do not see it."""
        own = self.in_use
        if pruner is not None and pruner is not own.pruner:
            own = own._replace(pruner=self.checked(pruner))
        token = IN_CALLS.set({**IN_CALLS.get(), ref(self): own})
        try:
            yield
        finally:
            IN_CALLS.reset(token)

    @property
    def image_settings(self) -> ImageSettings:
        """How images are cut for the method in use and how their tokens are laid out:
        `process_images(images, image_processor, model.image_settings)`."""
        return ImageSettings.of_checkpoint(self.config).changed(self.in_use.image_changes)

    def save_pretrained(
        self, save_directory, is_main_process: bool = True, state_dict=None, *args, **kwargs
    ) -> None:
        """Saves the model without the parts of the method in use; arguments as in transformers."""
        if self.engine is not None:
            raise ValueError("a model whose decoder layers run in a server cannot be saved")
        if state_dict is not None:
            state_dict = {
                key: own for key, own in state_dict.items() if not key.startswith("pruner_module.")
            }
        pruner, self.pruner = self._assigned.pruner, Pruner()
        given = save_directory, is_main_process, state_dict
        try:
            with any_generation_config(self, save_directory if is_main_process else None):
                super().save_pretrained(*given, *args, **kwargs)
        finally:
            self.pruner = pruner
        if is_main_process:
            share_files(save_directory)

    def crops_in_budget(self, pruner: Pruner) -> int:
        """Crops of one image that share `visual_token_num`."""
        settings = ImageSettings.of_checkpoint(self.config)
        if settings.image_aspect_ratio != "anyres":
            return 1
        if pruner.vision.anyres_tiles is not None:
            return 1 + math.prod(pruner.vision.anyres_tiles)
        side = self.get_vision_tower().image_size
        return 1 + max((w // side) * (h // side) for w, h in settings.image_grid_pinpoints)
