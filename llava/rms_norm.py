"""The norm of Llama's layers, in the decoder and in what is trained beside it."""

from __future__ import annotations

import torch
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
