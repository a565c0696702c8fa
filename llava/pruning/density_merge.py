"""Some tokens stay as they are, the others are merged around those that are dense and unlike any
denser one; batched over crops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .captured import captured
from .ops import cosines, denser, first_copies, gather_tokens, top_stable


class Merged(NamedTuple):
    """Tokens of crops in order of place.

    places:  (B, T)
    embeds:  (B, T, D)
    sizes:   (B, T) fp32 tokens that each counts for
    blended: (B, T) True on those that stand for a group
    """

    places: Tensor
    embeds: Tensor
    sizes: Tensor
    blended: Tensor


@captured
def merge(features: Tensor, kept: Tensor, count: int, kept_size: float) -> tuple[Tensor, ...]:
    """`Merged` of features (B, N, D): those at `kept` (B, K), each counting for `kept_size`, and
    the means of `count` groups of the others, each at the middle one of its places (of two in the
    middle the lower one). count = 0: the others are dropped."""
    sizes = torch.full_like(kept, kept_size, dtype=torch.float32)
    places, embeds = kept, gather_tokens(features, kept)
    if count:
        group, _, _ = groups_of(features, kept, count)
        number = torch.arange(count, device=kept.device)
        member = (group[:, None] == number[:, None]).float()  # (B, count, N)
        size = member.sum(dim=2)
        means = (member @ features.float()) / size[..., None]
        by_group = group.argsort(dim=1, stable=True)  # those of a group in order of place
        whole = size.long()
        middle = by_group.gather(1, whole.cumsum(dim=1) - whole + (whole - 1) // 2)
        places = torch.cat([places, middle], dim=1)
        embeds = torch.cat([embeds, means.to(embeds.dtype)], dim=1)
        sizes = torch.cat([sizes, size], dim=1)
    order = places.argsort(dim=1)
    blended = order >= kept.shape[1]
    return places.gather(1, order), gather_tokens(embeds, order), sizes.gather(1, order), blended


def groups_of(features: Tensor, kept: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(group of every token (B, N), `count` for those at `kept`; the token that each group forms
    around (B, count), best first; density (B, N)) of features (B, N, D).

    The density of a token is the sum of its cosines with all. Groups form around tokens that are
    dense, and unlike any that is denser; of equal density the earlier one is denser.
    """
    alike = cosines(features)  # (B, N, N)
    first = first_copies(alike)
    density = alike.sum(dim=2).gather(1, first)
    nearest = alike.masked_fill(~denser(density), -torch.inf).amax(dim=2)
    score = density * (1 - nearest)
    score = score.masked_fill(nearest == -torch.inf, torch.inf)  # the densest of all
    score = score.scatter(1, kept, -torch.inf)
    anchors = top_stable(score, count)
    number = torch.arange(count, device=kept.device).expand_as(anchors)
    around = first.gather(1, anchors)[:, None].expand(-1, alike.shape[1], -1)
    group = alike.gather(2, around).argmax(dim=2)
    return group.scatter(1, anchors, number).scatter(1, kept, count), anchors, density
