"""What layers are built of, in the decoder and in what is trained beside it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm, statistics in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.rsqrt(length.square() / x.shape[-1] + self.eps)
        # What a norm costs is memory: without gradients the fp32 copy is overwritten.
        own = wide is not x and not torch.is_grad_enabled()
        wide = wide.mul_(scale) if own else wide * scale
        return self.weight * wide.to(x.dtype)


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x (..., d) turned by the angles of its positions, `rope` being their cos and sin; the second
    half of d turns with the first. Computed in the wider of both types, and as wide as x."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
