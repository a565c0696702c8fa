"""Attention of few queries, by what is fastest for them.

SDPA's kernel for CPUs makes a product of its own for every head of queries. With one query those
are a matrix and a vector each: in bfloat16 the slowest way to multiply, and where several heads
share keys, these are read once for each of them. The numbers are in docs/CPU.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import linear
from .compiling import constant

#: most queries whose heads become the queries of the one head of keys that they share
FEW_QUERIES = 16
#: in bfloat16 a single query is asked so many times, so that products are of two matrices
COPIES = 2


@constant
def threads() -> int:
    return torch.get_num_threads()


def fills_threads(k: Tensor) -> bool:
    """Whether work that is split by the heads of keys (B, G, K, d) keeps a CPU busy. SDPA splits it
    by those of queries, and makes up with more threads for what it does more slowly."""
    return 2 * k.shape[1] >= threads()


def suits(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend_few` is for queries (B, H, Q, d) under a mask. Compiled code that serves
    other numbers of queries, too, is not asked how many they are: it would be compiled again."""
    if not q.is_cpu or not linear.OWN_WAYS:
        return False
    if q.shape[1] == k.shape[1]:  # what is done then was not measured on Intel's processors
        return q.shape[2] == 1 and not linear.ON_INTEL
    if not fills_threads(k):
        return False
    if q.shape[2] == 1:
        return True
    if mask is None or torch.compiler.is_compiling() and not linear.is_fixed(q.shape[2]):
        return False
    return q.shape[2] <= FEW_QUERIES


def attend_few(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As `attend`, where `suits` says so: without a mask, and where heads have keys of their own,
    there is one query.

    Results differ in the order of summation; those of compiled code are rounded less often.
    """
    if q.shape[1] != k.shape[1]:
        return attend_folded(q, k, v, mask)
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return _looped(q, k, v, mask)
    if q.dtype is torch.bfloat16:
        q = q.expand(-1, -1, COPIES, -1).contiguous()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, :, :1]


def attend_folded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same, where heads share keys: they become queries of one head, on any device."""
    rows = q.reshape(len(q), k.shape[1], -1, q.shape[3])
    if mask is not None and q.shape[2] > 1:
        mask = mask.repeat(1, 1, q.shape[1] // k.shape[1], 1)
    # Not a view: kernels of GPUs have their output lie query by query.
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).reshape(q.shape)


def _looped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One query, summed in fp32: compiled it becomes a loop over the keys and one over the values.
    For more queries they gain little or lose, and take long to compile."""
    asked = linear.materialized(q.float() * q.shape[3] ** -0.5)
    scores = (asked * k.float()).sum(dim=3).unsqueeze(2)  # (B, H, 1, K)
    if mask is not None:
        scores = masked(scores, mask)
    weights = (scores - scores.amax(dim=3, keepdim=True)).exp()
    out = (weights.transpose(2, 3) * v.float()).sum(dim=2, keepdim=True)
    return (out / weights.sum(dim=3, keepdim=True)).to(q.dtype)


def masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Scaled products as the softmax takes them; `mask` as in `attend`, of the same rank."""
    return scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, float("-inf"))
