"""CLIP vision tower: patch features of one layer, and the extras a pruning method asks for.

The weights live in transformers' `CLIPVisionModel`; the forward pass is our own: SDPA instead of
eager attention, no layer after the selected one, and attention rows without attention maps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from ...pruning.base import VisionTokens

EXTRAS = frozenset({"cls_attention", "keys", "fingerprint"})


class CLIPVisionTower(nn.Module):
    """A frozen CLIP vision model that returns the hidden states of `mm_vision_select_layer`.

    vision_tower: folder or hub name
    args:         config with `mm_vision_select_layer`, `mm_vision_select_feature` ("patch" or
                  "cls_patch") and `unfreeze_mm_vision_tower`
    delay_load:   read the config only; `load_model` reads the weights
    """

    def __init__(self, vision_tower: str, args, delay_load: bool = False):
        super().__init__()
        self.is_loaded = False
        self.vision_tower_name = vision_tower
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        if self.select_feature not in ("patch", "cls_patch"):
            raise ValueError(
                f"Unexpected select feature: {self.select_feature!r}, choose patch or cls_patch"
            )
        if delay_load and not getattr(args, "unfreeze_mm_vision_tower", False):
            self.cfg_only = CLIPVisionConfig.from_pretrained(vision_tower)
        elif delay_load:  # the checkpoint brings the tower's weights
            self._install(CLIPVisionModel(CLIPVisionConfig.from_pretrained(vision_tower)))
        else:
            self.load_model()

    def load_model(self, device_map=None, torch_dtype=None) -> None:
        """Reads the weights; does nothing when they are there."""
        if not self.is_loaded:
            kwargs = {} if torch_dtype is None else {"torch_dtype": torch_dtype}
            self._install(
                CLIPVisionModel.from_pretrained(
                    self.vision_tower_name, device_map=device_map, **kwargs
                )
            )

    def _install(self, model: CLIPVisionModel) -> None:
        self.image_processor = self.load_image_processor()
        self.vision_tower = model.requires_grad_(False)
        self.is_loaded = True

    def load_image_processor(self) -> CLIPImageProcessor:
        return CLIPImageProcessor.from_pretrained(self.vision_tower_name)

    @torch.no_grad()
    def forward(self, images: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Features (n, N, C) of crops (n, 3, S, S); a list of crops gives a list of (1, N, C)."""
        if isinstance(images, list):
            return [self(image[None]) for image in images]
        return self.tokens(images).features

    @torch.no_grad()
    def tokens(self, images: Tensor, needs: frozenset[str] = frozenset()) -> VisionTokens:
        """Tokens of crops (B, 3, S, S) with the extras named in `needs` (see `VisionTokens`)."""
        if unknown := needs - EXTRAS:
            raise ValueError(f"unknown extras {sorted(unknown)}, choose from {sorted(EXTRAS)}")
        hidden, attention, keys = self._run(images, bool(needs & {"cls_attention", "keys"}))
        hidden = hidden.to(images.dtype) if images.is_floating_point() else hidden
        if self.select_feature == "patch":
            hidden = hidden[:, 1:]
        count = hidden.shape[1]
        side = self.num_patches_per_side
        return VisionTokens(
            features=hidden,
            positions=torch.arange(count, device=hidden.device).expand(hidden.shape[0], -1),
            grid=(side, side),
            cls_attention=attention if "cls_attention" in needs else None,
            keys=keys if "keys" in needs else None,
            fingerprint=fingerprint(images) if "fingerprint" in needs else None,
        )

    def _run(self, images: Tensor, probe: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Hidden states (B, 1 + N, C) of the selected layer; with `probe` also that layer's
        class-token attention (B, H, N) in fp32 and patch keys (B, N, C)."""
        model = self.vision_tower.vision_model
        x = model.pre_layrnorm(model.embeddings(images.to(self.device, self.dtype)))
        layers = model.encoder.layers[: self.num_run_layers]
        attention = keys = None
        for number, layer in enumerate(layers, start=1):
            out, rows = self_attention(
                layer.self_attn, layer.layer_norm1(x), probe and number == len(layers)
            )
            attention, keys = rows if rows is not None else (None, None)
            x = x + out
            x = x + layer.mlp(layer.layer_norm2(x))
        return x, attention, keys

    @property
    def num_run_layers(self) -> int:
        """Encoder layers that run: `hidden_states[select_layer]`, index 0 being the embeddings."""
        total = self.config.num_hidden_layers
        number = self.select_layer if self.select_layer >= 0 else total + 1 + self.select_layer
        if not 0 <= number <= total:
            raise ValueError(
                f"mm_vision_select_layer ({self.select_layer}) is outside the {total} tower layers"
            )
        return number

    @property
    def dummy_feature(self) -> Tensor:
        return torch.zeros(1, self.hidden_size, device=self.device, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_tower.dtype

    @property
    def device(self) -> torch.device:
        return self.vision_tower.device

    @property
    def config(self) -> CLIPVisionConfig:
        return self.vision_tower.config if self.is_loaded else self.cfg_only

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def image_size(self) -> int:
        """Side of one crop in pixels."""
        return self.config.image_size

    @property
    def num_patches_per_side(self) -> int:
        return self.config.image_size // self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.num_patches_per_side**2


def self_attention(attn, x: Tensor, probe: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Full attention of a CLIP layer on its normed input x (B, 1 + N, C).

    With `probe` also the class token's row over the patches (B, H, N), a softmax over all keys of
    which the class token's own share is cut off, and the patches' keys (B, N, C).
    """
    q, k, v = (
        proj(x).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    rows = None
    if probe:
        scores = q[:, :, :1].float() @ k.float().transpose(2, 3) * attn.scale
        rows = scores.softmax(dim=-1)[:, :, 0, 1:], k.transpose(1, 2).flatten(2)[:, 1:]
    return attn.out_proj(out), rows


def fingerprint(images: Tensor) -> Tensor:
    """(B,) integers that depend on the pixels of each crop alone (exact, any device and batch)."""
    pixels = (images.double() * 4096).round().long().flatten(1)
    weights = torch.arange(1, pixels.shape[1] + 1, device=images.device) * 2654435761
    return (pixels * weights).sum(dim=1)
