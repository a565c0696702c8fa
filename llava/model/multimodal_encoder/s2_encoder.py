"""Multi-scale CLIP tower (S2): the same tower on several sizes of the image, channels stacked.

Paper: When Do We Not Need Larger Vision Models?, https://arxiv.org/abs/2403.13043
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPImageProcessor

from ...pruning.cues import check_cues, fingerprint
from ...pruning.stages import VisionStage
from ...pruning.tokens import VisionTokens
from .clip_encoder import CLIPVisionTower


class CLIPVisionTowerS2(CLIPVisionTower):
    """CLIP features at every scale of `args.s2_scales` (pixels, "336,672,1008").

    The smallest scale is the tower's own input size. Pixels arrive at the largest one. Cues of
    layers are not there: layers run once for every scale.
    """

    title = "the multi-scale tower"
    provides, provides_in_layers = frozenset({"fingerprint", "one_grid"}), frozenset()
    takes_smaller_images = False

    def __init__(self, vision_tower: str, args, delay_load: bool = False):
        self.s2_scales = sorted(
            int(side) for side in getattr(args, "s2_scales", "336,672,1008").split(",")
        )
        super().__init__(vision_tower, args, delay_load)

    def load_image_processor(self) -> CLIPImageProcessor:
        processor = super().load_image_processor()
        side = self.s2_scales[-1]
        processor.size["shortest_edge"] = side
        processor.crop_size["height"] = processor.crop_size["width"] = side
        return processor

    def tokens(
        self,
        images: Tensor,
        needs: frozenset[str] = frozenset(),
        stage: VisionStage | None = None,
        crops_in_budget: int = 1,
        image_index: Tensor | None = None,
    ) -> VisionTokens:
        images = images.to(self.device)
        if images.shape[-1] != images.shape[-2]:
            raise ValueError(f"the multi-scale tower needs square images, got {images.shape[-2:]}")
        if stage is not None:
            check_cues(stage, self)
        before = (
            images
            if stage is None
            else stage.before_tower(images, self.config.patch_size, crops_in_budget)
        )
        if before.shape != images.shape:
            raise ValueError(f"the multi-scale tower cannot take smaller images, as {stage!r} asks")
        images = before
        maps = [self._scale_map(images, side) for side in self.s2_scales]
        height, width = size = maps[0].shape[-2:]
        maps = [F.interpolate(m.float(), size=size, mode="area").to(m.dtype) for m in maps]
        features = torch.cat(maps, dim=1).flatten(2).transpose(1, 2).to(images.dtype)
        batch, count = features.shape[:2]
        places = torch.arange(count, device=features.device).expand(batch, -1)
        return VisionTokens(
            features=features,
            positions=places,
            all_patches=places,
            grid=(height, width),
            crops_in_budget=crops_in_budget,
            fingerprint=fingerprint(images) if "fingerprint" in needs else None,
        )

    def _scale_map(self, images: Tensor, side: int) -> Tensor:
        """(B, C, tiles * g, tiles * g) features of the images resized to `side` pixels."""
        window = self.s2_scales[0]
        tiles = -(-side // window)
        scaled = F.interpolate(
            images.float(), size=(side, side), mode="bicubic", align_corners=False
        ).to(images.dtype)
        batch, edge = images.shape[0], side // tiles
        # (B, 3, tiles, edge, tiles, edge) -> one crop per tile, tiles of an image row by row
        crops = scaled.unflatten(3, (tiles, edge)).unflatten(2, (tiles, edge))
        crops = crops.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)
        owner = torch.arange(len(crops), device=crops.device)
        hidden = self._run(crops, {}, {}, VisionStage(), owner).hidden_states
        hidden = hidden[:, 1:] if self.select_feature == "patch" else hidden
        grid = int(hidden.shape[1] ** 0.5)
        grids = hidden.transpose(1, 2).unflatten(2, (grid, grid))
        grids = grids.unflatten(0, (tiles, tiles, batch)).permute(2, 3, 0, 4, 1, 5)
        return grids.flatten(4, 5).flatten(2, 3)

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size * len(self.s2_scales)
