"""The vision parts of a model: tower, projector and newline, built, and readied for training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .checkpoint import read_file
from .model_part import ModelPart
from .multimodal_encoder.builder import build_vision_tower
from .multimodal_projector.builder import build_vision_projector
from .split_parameters import whole


class LlavaMetaModel(ModelPart):
    """Mixin of the inner model: holds tower, projector and the newline embedding."""

    def __init__(self, config):
        super().__init__(config)
        if getattr(config, "mm_vision_tower", None):
            self.vision_tower: Any = build_vision_tower(config, delay_load=True)
            self.mm_projector = build_vision_projector(config, delay_load=True)
            if "unpad" in getattr(config, "mm_patch_merge_type", "flat"):
                self.image_newline = nn.Parameter(torch.empty(config.hidden_size))

    def get_vision_tower(self):
        tower = getattr(self, "vision_tower", None)
        return tower[0] if isinstance(tower, list) else tower

    def initialize_vision_modules(self, model_args, fsdp=None) -> None:
        """Adds tower and projector to a language model, or readies those it has, for training.

        `model_args` names them as in `llava.train.arguments.ModelArguments`; weights of
        `pretrain_mm_mlp_adapter` are loaded into the projector (and newline embedding, if there).
        """
        config = self.config
        config.mm_vision_tower = model_args.vision_tower
        config.mm_vision_select_layer = model_args.mm_vision_select_layer
        config.mm_vision_select_feature = model_args.mm_vision_select_feature
        config.mm_patch_merge_type = model_args.mm_patch_merge_type
        tower = self.get_vision_tower()
        if tower is None:
            tower = build_vision_tower(model_args)
            self.vision_tower = [tower] if fsdp else tower  # a list keeps FSDP from wrapping it
        else:
            tower.load_model()
        config.use_mm_proj = True
        config.mm_projector_type = getattr(model_args, "mm_projector_type", "linear")
        config.mm_hidden_size = tower.hidden_size
        if getattr(self, "mm_projector", None) is None:
            self.mm_projector = build_vision_projector(config)
            if "unpad" in config.mm_patch_merge_type:
                width = config.hidden_size
                self.image_newline = nn.Parameter(torch.randn(width) / math.sqrt(width))
        else:
            self.mm_projector.requires_grad_(True)
        if model_args.pretrain_mm_mlp_adapter:
            self._load_adapter(model_args.pretrain_mm_mlp_adapter)

    def _load_adapter(self, path: str) -> None:
        weights = read_file(path)
        projector = {
            key.split("mm_projector.", 1)[1]: value
            for key, value in weights.items()
            if "mm_projector." in key
        }
        with whole(self.mm_projector.parameters(), change=True):
            wanted = {key: tuple(p.shape) for key, p in self.mm_projector.state_dict().items()}
            given = {key: tuple(value.shape) for key, value in projector.items()}
            if given != wanted:
                raise ValueError(
                    f"{path} holds a projector of shapes {given or 'none at all'}, the model has "
                    f"{wanted}: does mm_projector_type {self.config.mm_projector_type!r} fit?"
                )
            self.mm_projector.load_state_dict(projector)
        for key, value in weights.items():
            if key.endswith("image_newline") and hasattr(self, "image_newline"):
                with whole([self.image_newline], change=True):
                    self.image_newline.data.copy_(value)
