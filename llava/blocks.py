"""What layers are built of, in the decoder and in what is trained beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import linear
from .linear import Linear

#: most tokens that a CPU sees at a time, see `in_pieces`
PIECE = 512


class RMSNorm(nn.Module):
    """Root-mean-square norm, statistics in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # Half precision is rounded before the weight is multiplied, as checkpoints were trained.
        return self.weight * F.rms_norm(x, (x.shape[-1],), eps=self.eps)


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int, bias: bool = False):
        super().__init__()
        self.gate_proj = Linear(width, inner, bias=bias)
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rope_of(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `rotate` takes, from the angles (..., d / 2) that pairs of values turn by: their cosines
    and sines, (..., d) each, sines being negative in the first half."""
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x (..., d) turned by what `rope_of` gives for its positions; the second half of d turns with
    the first. Computed in the wider of both types, and as wide as x."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, which treats every token of x (..., D) alone. On a CPU it sees so many tokens
    at a time that what it makes on the way stays in the caches: from memory that would cost more
    than large products save."""
    if not x.is_cpu or not linear.OWN_WAYS or torch.is_grad_enabled():
        return function(x)
    if torch.compiler.is_compiling():  # every number of pieces were a graph of its own
        return function(x)
    if x.shape[:-1].numel() <= PIECE:
        return function(x)
    pieces = -(-x.shape[:-1].numel() // PIECE)
    parts = [function(part) for part in x.flatten(0, -2).chunk(pieces)]
    return torch.cat(parts).unflatten(0, x.shape[:-1])
