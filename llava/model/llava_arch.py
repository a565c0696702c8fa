"""What LLaVA adds to a language model: vision parts, encoding, splice, and a pruning method."""

from __future__ import annotations

from torch import Tensor

from .encoding import ImageEncoding
from .image_layout import unpad_image
from .image_marks import ImageMarks
from .pruner_slot import PrunerSlot
from .splice import Splice
from .vision_modules import LlavaMetaModel

__all__ = ["LlavaMetaForCausalLM", "LlavaMetaModel", "unpad_image"]


class LlavaMetaForCausalLM(ImageEncoding, Splice, ImageMarks, PrunerSlot):
    """Mixin of the causal language models: encoding and splicing, with a pruning method in use."""

    def get_model(self):
        raise NotImplementedError(f"{type(self).__name__} must define get_model()")

    def get_vision_tower(self):
        return self.get_model().get_vision_tower()

    def image_extent(self, pixels: Tensor) -> int:
        """Positions that an image takes without a method; pixels: (3, S, S) or (crops, 3, S, S)."""
        crops = pixels.shape[0] if pixels.ndim == 4 else 1
        return crops * self.get_vision_tower().num_patches
