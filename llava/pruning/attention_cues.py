"""Cues that the queries and keys of a layer of a vision tower give, the class token first."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from .ops import split_heads
from .precision import full_precision


def attention_extras(
    num_heads: int,
    scale: float,
    q: Tensor,
    k: Tensor,
    names: frozenset[str],
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """The cues of one layer that its queries and keys (B, 1 + N, C) give, in fp32.

    scale: of the products of queries and keys
    mask:  (B, 1 + N) fp32 what is added to the products with a key, -inf where there is none; None:
           nothing

    cls_attention (B, H, N) is a softmax over all keys of which the class token's own share is cut
    off, salience (B, N) its mean over heads; attention_mean (B, N) is the column mean of the map
    over heads and all queries.
    """
    with full_precision(q.device):
        return _extras(num_heads, scale, q, k, names, mask)


def _extras(
    num_heads: int, scale: float, q: Tensor, k: Tensor, names: frozenset[str], mask: Tensor | None
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    if "keys" in names:
        found["keys"] = k[:, 1:]
    if "cls_query" in names:
        found["cls_query"] = q[:, 0]
    if "cls_key" in names:
        found["cls_key"] = k[:, 0]
    if names & {"salience", "cls_attention", "attention_mean"}:
        queries, keys = (split_heads(t, num_heads).float() for t in (q, k))
        keys = keys.transpose(2, 3) * scale
        real = None
        if mask is not None:
            mask, real = mask[:, None, None], mask > float("-inf")

    def weights(scores: Tensor) -> Tensor:
        return (scores if mask is None else scores + mask).softmax(dim=-1)

    if names & {"salience", "cls_attention"}:
        row = weights(queries[:, :, :1] @ keys)[:, :, 0, 1:]
        cues = {"cls_attention": row, "salience": row.mean(dim=1)}
        found |= {name: cue for name, cue in cues.items() if name in names}
    if "attention_mean" in names:  # head by head: one map at a time is enough memory
        share = None if real is None else (real / real.sum(dim=1, keepdim=True))[:, None]

        def received(head: int) -> Tensor:
            rows = weights(queries[:, head, None] @ keys[:, head, None])[:, 0]  # (B, 1 + N, 1 + N)
            return rows.mean(dim=1) if share is None else (share @ rows)[:, 0]

        total = reduce(torch.add, map(received, range(num_heads)))
        found["attention_mean"] = (total / num_heads)[:, 1:]
    return found
