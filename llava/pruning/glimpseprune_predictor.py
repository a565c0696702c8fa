"""GlimpsePrune's visual importance predictor: attention of the glimpse in, one logit a patch out.

`config` is the `GlimpseConfig` of the trained part that the predictor belongs to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import GatedMLP, RMSNorm, rotate


class ImportancePredictor(nn.Module):
    """A small transformer over the patches of one view: attention of the glimpse in, logits out.

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
        self.head_width = (width + config.visual_cond_size) // config.attn_fuse_num_heads

    def conditions(self, states: list[Tensor]) -> Tensor:
        """(B, N, J * C) from J hidden states (B, N, vision width) of the tower."""
        parts = zip(self.cond_in_projs, states, strict=True)
        return torch.cat([project(x.to(project.weight.dtype)) for project, x in parts], dim=-1)

    def forward(
        self, rows: Tensor, conditions: Tensor, grid: tuple[int, int], real: Tensor | None = None
    ) -> list[Tensor]:
        """Logits (V, N) of every output, the one that decides last.

        rows:       (V, N, layers * heads) what the glimpse pays each patch of V views
        conditions: (V, N, J * C) of `conditions`
        grid:       (h, w) patches of a view, N = h * w
        real:       (V, N) False where there is no token; None: everywhere is one
        """
        x = self.attn_in_proj(rows.to(self.attn_in_proj.weight.dtype))
        rope = grid_angles(grid, self.head_width, x.device)
        mask = None
        if real is not None:  # a view without tokens sees everything, so that no NaN comes up
            mask = (real | ~real.any(dim=1, keepdim=True))[:, None, None]
        outputs = []
        parts = conditions.to(x.dtype).chunk(len(self.layers), dim=-1)
        for layer, condition, head in zip(self.layers, parts, self.attn_out_projs, strict=True):
            x = layer(x, condition, rope, mask)
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

    def forward(self, x: Tensor, condition: Tensor, rope, mask: Tensor | None) -> Tensor:
        """x (V, N, F) and condition (V, N, C) -> (V, N, F)."""
        x = x + self.attn(self.norm1(x), condition, rope, mask)
        return x + self.mlp(self.norm2(x))


class PredictorAttention(nn.Module):
    """Attention in which every patch of a view sees every other; values see no condition."""

    def __init__(self, config):
        super().__init__()
        width, both = config.attn_fuse_size, config.attn_fuse_size + config.visual_cond_size
        self.num_heads = config.attn_fuse_num_heads
        self.q_proj = nn.Linear(both, both, bias=False)
        self.k_proj = nn.Linear(both, both, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, condition: Tensor, rope, mask: Tensor | None) -> Tensor:
        seen = torch.cat([x, condition], dim=-1)
        q, k = (rotate(self._split(p(seen)), rope) for p in (self.q_proj, self.k_proj))
        v = self._split(self.v_proj(x))
        # Fast kernels want values as wide as keys, the others write out the whole attention map.
        wide = F.pad(v, (0, k.shape[-1] - v.shape[-1]))
        out = F.scaled_dot_product_attention(q, k, wide, attn_mask=mask)[..., : v.shape[-1]]
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def grid_angles(grid: tuple[int, int], width: int, device) -> tuple[Tensor, Tensor]:
    """fp32 cos and sin (N, width) of 2D RoPE: half of the angles turn with the row, half with the
    column."""
    even = torch.arange(width // 4, device=device, dtype=torch.float32)
    frequency = 10000.0 ** (-4 * even / width)
    row, column = (torch.arange(side, device=device)[:, None] * frequency for side in grid)
    angle = torch.cat([row.repeat_interleave(grid[1], dim=0), column.repeat(grid[0], 1)], dim=1)
    angle = torch.cat([angle, angle], dim=1)
    return angle.cos(), angle.sin()
