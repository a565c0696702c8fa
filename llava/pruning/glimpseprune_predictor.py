"""GlimpsePrune's visual importance predictor: attention of the glimpse in, one logit a patch out.

`config` is the `GlimpseConfig` of the trained part that the predictor belongs to. Patches of all
views are one sequence, see `llava.pruning.glimpseprune_views`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import GatedMLP, RMSNorm, rotate
from ..segments import Segments, attend_within
from .glimpseprune_views import Grid, grid_angles, neighbours


class ImportancePredictor(nn.Module):
    """A small transformer over the patches of views: attention of the glimpse in, logits out.

    Queries and keys also see a hidden state of the vision tower, and where on the grid they are.
    """

    def __init__(self, config):
        super().__init__()
        width, count = config.attn_fuse_size, len(config.selected_visual_layers)
        inputs = config.num_attention_heads * len(config.selected_layers)
        self.attn_in_proj = nn.Linear(inputs, width)
        self.cond_in_projs = nn.ModuleList(
            nn.Linear(config.mm_hidden_size, config.visual_cond_size) for _ in range(count)
        )
        self.layers = nn.ModuleList(PredictorLayer(config) for _ in range(count))
        self.attn_out_projs = nn.ModuleList(
            nn.Linear(width, 1) if config.deep_supervision or j == count - 1 else nn.Identity()
            for j in range(count)
        )
        self.all_outputs = config.deep_supervision
        self.window_side = None if config.attn_fuse_global else config.window_side
        self.head_width = (width + config.visual_cond_size) // config.attn_fuse_num_heads

    def conditions(self, states: list[Tensor]) -> Tensor:
        """(B, N, J * C) from J hidden states (B, N, vision width) of the tower."""
        parts, dtype = zip(self.cond_in_projs, states, strict=True), self.attn_in_proj.weight.dtype
        return torch.cat([project(x.to(dtype)) for project, x in parts], dim=-1)

    def forward(
        self,
        rows: Tensor,
        conditions: Tensor,
        grids: Sequence[Grid],
        real: Tensor | None = None,
    ) -> list[Tensor]:
        """Logits (n,) of every output, the one that decides last.

        rows:       (n, layers * heads) what the glimpse pays each patch of all views
        conditions: (n, J * C) of `conditions`
        grids:      (h, w) patches of every view
        real:       (n,) False where there is no patch; None: everywhere is one
        """
        x = self.attn_in_proj(rows.to(self.attn_in_proj.weight.dtype))
        rope = grid_angles(grids, self.head_width, x.device)
        segments = neighbours(grids, self.window_side, x.device)
        outputs = []
        parts = conditions.to(x.dtype).chunk(len(self.layers), dim=-1)
        for layer, condition, head in zip(self.layers, parts, self.attn_out_projs, strict=True):
            x = layer(x, condition, rope, segments, real)
            if self.all_outputs or layer is self.layers[-1]:
                outputs.append(head(x)[..., 0])
        return outputs


class PredictorLayer(nn.Module):
    """Attention and gated MLP, pre-norm, with residual connections."""

    def __init__(self, config):
        super().__init__()
        width = config.attn_fuse_size
        self.norm1, self.norm2 = RMSNorm(width, 1e-6), RMSNorm(width, 1e-6)
        self.attn = PredictorAttention(config)
        self.mlp = GatedMLP(width, 2 * width, bias=True)

    def forward(
        self, x: Tensor, condition: Tensor, rope: tuple, segments: Segments, real: Tensor | None
    ) -> Tensor:
        """x (n, F) and condition (n, C) -> (n, F)."""
        x = x + self.attn(self.norm1(x), condition, rope, segments, real)
        return x + self.mlp(self.norm2(x))


class PredictorAttention(nn.Module):
    """Attention in which every patch sees all of its segment; values see no condition."""

    def __init__(self, config):
        super().__init__()
        width, both = config.attn_fuse_size, config.attn_fuse_size + config.visual_cond_size
        self.num_heads = config.attn_fuse_num_heads
        self.q_proj = nn.Linear(both, both, bias=False)
        self.k_proj = nn.Linear(both, both, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, condition: Tensor, rope: tuple, segments: Segments, real: Tensor | None
    ) -> Tensor:
        seen = torch.cat([x, condition], dim=-1)
        q, k = (rotate(self._split(p(seen)), rope) for p in (self.q_proj, self.k_proj))
        v = self._split(self.v_proj(x))
        # Fast kernels want values as wide as keys, the others write out the whole attention map.
        wide = F.pad(v, (0, k.shape[-1] - v.shape[-1]))
        out = attend_within(q, k, wide, segments, real)[..., : v.shape[-1]]
        return self.o_proj(out.flatten(1))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))
