"""Attention among parts of a sequence alone: images side by side, windows of an image.

Segments of equal size are rows of one batch, so that nothing is padded and no mask is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Segments:
    """Which tokens of a sequence attend to one another: those of a segment, and nobody else.

    order: (n,) the sequence with segments of equal size side by side; None: it is as it should be
    back:  (n,) the way back
    runs:  (segments, tokens of each), in that order
    ends:  (segments + 1,) int32 where each begins and the last one ends, once it was asked for
    """

    order: Tensor | None
    back: Tensor | None
    runs: list[tuple[int, int]]
    ends: Tensor | None = None

    def to(self, device: torch.device) -> Segments:
        order = None if self.order is None else self.order.to(device, non_blocking=True)
        back = None if self.back is None else self.back.to(device, non_blocking=True)
        return Segments(order, back, self.runs)

    @property
    def longest(self) -> int:
        return max(size for _, size in self.runs)

    def ends_on(self, device: torch.device) -> Tensor:
        """`ends`, which are brought to a device once for all layers."""
        if self.ends is None or self.ends.device != device:
            sizes = [size for count, size in self.runs for _ in range(count)]
            ends = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)
            self.ends = ends.to(device, non_blocking=True)
        return self.ends


def segments_of(size: Tensor, owner: Tensor, block: int = 1) -> Segments:
    """Segments of blocks of tokens: `owner` (m,) says which one has a block, `size` (m,) how many
    blocks that one has."""
    by_owner = owner.argsort(stable=True)
    order = by_owner[size[by_owner].argsort(stable=True)]
    sizes, blocks = (found.tolist() for found in size.unique(return_counts=True))
    runs = [(count // own, own * block) for own, count in zip(sizes, blocks, strict=True)]
    if torch.equal(order, torch.arange(len(order))):
        return Segments(None, None, runs)
    tokens = (order[:, None] * block + torch.arange(block)).flatten()
    return Segments(tokens, tokens.argsort(), runs)


def windows_of(h: int, w: int, side: int) -> Tensor:
    """(h * w,) the window that every place of an h x w grid lies in, row by row. Windows start at
    the top left, so that the last of a row or column may be smaller."""
    row, column = torch.arange(h)[:, None], torch.arange(w)
    return (row // side * -(-w // side) + column // side).flatten()


def window_order(h: int, w: int, side: int) -> tuple[Tensor, Tensor]:
    """Row-major places (h * w,) of an h x w grid, window by window, and (windows,) how many each
    has."""
    window = windows_of(h, w, side)
    return window.argsort(stable=True), window.bincount()


def attend_within(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, visible: Tensor | None = None
) -> Tensor:
    """Attention (n, H, d) of q, k, v (n, H, d) inside segments; those of one size are one batch,
    and where torch has a kernel for it, those of all sizes.

    visible: (n,) False on keys that nobody sees, unless all of a segment are; None: all are seen
    """
    if segments.order is not None:
        q, k, v = (x[segments.order] for x in (q, k, v))
        visible = None if visible is None else visible[segments.order]
    if visible is None and len(segments.runs) > 1 and takes_all_sizes(q):
        ends, longest = segments.ends_on(q.device), segments.longest
        whole = all_sizes()(q, k, v, ends, ends, longest, longest)
    else:
        whole = _size_by_size(q, k, v, segments, visible)
    return whole if segments.back is None else whole[segments.back]


@cache
def all_sizes() -> Callable | None:
    """torch's attention inside segments of any sizes, if there is one. It brings the whole compiler
    with it, 1.4 s that programs without a GPU do not wait for."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def takes_all_sizes(q: Tensor) -> bool:
    """Whether torch (2.10 on) attends inside segments of any sizes with one kernel: that of
    FlashAttention, on GPUs of compute capability 8.0 on, in half precision, without gradients."""
    if q.device.type != "cuda" or torch.version.hip is not None or all_sizes() is None:
        return False
    half = q.dtype in (torch.float16, torch.bfloat16)
    half = half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    if not half or torch.is_grad_enabled() and q.requires_grad:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def _size_by_size(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, visible: Tensor | None
) -> Tensor:
    out, start = [], 0
    for count, size in segments.runs:
        run = slice(start, start := start + count * size)
        rows = (x[run].unflatten(0, (count, size)).transpose(1, 2) for x in (q, k, v))
        mask = None
        if visible is not None:
            own = visible[run].unflatten(0, (count, size))
            mask = (own | ~own.any(dim=1, keepdim=True))[:, None, None]
        found = F.scaled_dot_product_attention(*rows, attn_mask=mask)
        out.append(found.transpose(1, 2).flatten(0, 1))
    return out[0] if len(out) == 1 else torch.cat(out)
