"""Methods that have values of their own where images have grids of their own."""

from __future__ import annotations

from .base import Pruner
from .interfaces import LanguageModel
from .tokens import VisionTokens


class OwnGrids(Pruner):
    """Base of methods that are others where tokens are blocks of patches, as on Qwen2.5-VL, and
    have to know that before they see an image.

    own_grids: whether they are, in the model that the method is assigned to
    """

    own_grids = False

    def attach(self, model: LanguageModel) -> None:
        super().attach(model)
        tower = model.get_vision_tower()
        self.own_grids = tower is not None and tower.grid is None

    def check_model(self, vision: VisionTokens) -> None:
        """Raises ValueError when these are tokens of the other kind of model."""
        if (vision.block > 1) is not self.own_grids:
            raise ValueError(
                f"this {self.name} was assigned to another kind of model meanwhile: make one for "
                "each model"
            )
