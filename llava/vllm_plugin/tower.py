"""The CLIP tower of vLLM as methods see it: what it can tell them, and its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..pruning.attention_cues import attention_extras
from ..pruning.cues import cues_for, fingerprint
from ..pruning.stages import VisionStage
from ..pruning.tokens import VisionTokens

OWN_CUES = frozenset({"salience", "cls_attention", "keys"})


@dataclass(frozen=True)
class TowerShape:
    """What a config says of a tower; a `llava.pruning.interfaces.Tower`.

    depth: (number of layers, 0-based layer whose output are the features)
    grid:  (h, w) patches of an image
    """

    depth: tuple[int, int]
    grid: tuple[int, int]
    hidden_size: int
    num_heads: int
    select_feature: str = "patch"

    title = "the CLIP tower of vLLM"
    provides = OWN_CUES | {"cls_token", "fingerprint", "one_grid"}
    provides_in_layers = OWN_CUES | {"cls_query", "cls_key", "attention_mean"}
    window_side = None
    takes_smaller_images = False

    @classmethod
    def of(cls, config) -> TowerShape:
        """Of the config of a LLaVA in the layout of transformers."""
        vision, layer = config.vision_config, config.vision_feature_layer
        total = vision.num_hidden_layers
        if not isinstance(layer, int):
            raise ValueError(f"pruning needs one vision_feature_layer, not {layer!r}")
        if vision.model_type != "clip_vision_model":
            raise ValueError(f"pruning is for CLIP towers, and this is a {vision.model_type}")
        return cls(
            depth=(total, (layer if layer >= 0 else total + 1 + layer) - 1),
            grid=(vision.image_size // vision.patch_size,) * 2,
            hidden_size=vision.hidden_size,
            num_heads=vision.num_attention_heads,
            select_feature={"default": "patch"}.get(
                config.vision_feature_select_strategy, "cls_patch"
            ),
        )

    @property
    def whole_layers(self) -> list[int]:
        return list(range(self.depth[0]))

    def wanted(self, stage: VisionStage) -> dict[int, frozenset[str]]:
        """Cues that a method asks of layers, those of the features among them."""
        layers, selected = dict(stage.tower_extras(*self.depth)), self.depth[1]
        own = cues_for(stage, self) & OWN_CUES
        return {**layers, selected: layers.get(selected, frozenset()) | own}

    def tokens(
        self,
        pixels: Tensor,
        states: Tensor,
        queries_and_keys: Callable[[int], tuple[Tensor, Tensor]],
        stage: VisionStage,
    ) -> VisionTokens:
        """Tokens of images (B, 3, S, S) with the cues that a method asks for.

        states:           (B, 1 + N, C) output of the layer of the features
        queries_and_keys: number of a layer -> its queries and keys, (B, 1 + N, C)
        """
        cues, scale = cues_for(stage, self), (self.hidden_size // self.num_heads) ** -0.5
        layers = {
            number: attention_extras(self.num_heads, scale, *queries_and_keys(number), names)
            for number, names in self.wanted(stage).items()
            if names
        }
        own = layers.get(self.depth[1], {})
        places = torch.arange(states.shape[1] - 1, device=states.device)
        places = places.expand(len(states), -1)
        return VisionTokens(
            features=states[:, 1:],
            positions=places,
            grid=self.grid,
            image_index=torch.arange(len(states), device=states.device),
            all_patches=places,
            num_heads=self.num_heads,
            cls_token=states[:, :1] if "cls_token" in cues else None,
            layers=layers,
            fingerprint=fingerprint(pixels) if "fingerprint" in cues else None,
            **{name: own.get(name) for name in OWN_CUES},
        )


def tower_tokens(
    tower: nn.Module, pixels: Tensor, shape: TowerShape, stage: VisionStage
) -> VisionTokens:
    """Tokens of images (B, 3, S, S) that vLLM's tower gives, `CLIPVisionTransformer` there."""
    wanted, found = shape.wanted(stage), {}
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    for number, layer in enumerate(tower.encoder.layers):
        if wanted.get(number):
            joined, _ = layer.self_attn.qkv_proj(layer.layer_norm1(x))
            found[number] = joined.chunk(3, dim=-1)[:2]
        x = layer(x)
    return shape.tokens(pixels, x, found.__getitem__, stage)
