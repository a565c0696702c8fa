"""Greedy coverage: every pick is the token that adds most to what the picks before it cover.

What is covered are clients, say all patches of the image, each by the token kept that suits it
best. Known as facility location; the greedy choice is within 1 - 1/e of the best one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import NEGLIGIBLE, picks_then_rest


@torch.no_grad()
def cover_most(
    cover: Tensor, count: int, factor: Tensor | None = None, bonus: Tensor | None = None
) -> Tensor:
    """Places (B, T), T at most `count`, in the order they are picked.

    cover:  (B, N, U) fp32 how much of each of U clients every token would cover, times what the
            client counts; below 0 is 0. It is written to
    factor: (B, N), at least 0, of every token's gain; None: 1
    bonus:  (B, N), at least 0, beside every token's gain; None: none. Not with `factor`

    A token's gain is the sum, over clients, of what it would add. Ties go to the lower place; where
    no gain is more than rounding may leave, of 1 or of the first gain if that is less, what is left
    follows in order of place, or of the bonus.
    """
    batch, size, clients = cover.shape
    # With a large factor, what rounding left of one gain could beat another that is one.
    least = 0 if factor is bonus is None else NEGLIGIBLE
    whole = cover if bonus is None else torch.cat([cover, bonus[..., None]], dim=2)
    cover = whole[..., :clients]
    torch.threshold_(cover, least, 0)
    picks: list[Tensor] = []
    scores: list[Tensor] = []
    for number in range(min(count, size)):  # five small operations, six with either
        if number:  # what a token adds to a client shrinks by what the last pick added
            taken = cover.gather(1, picks[-1][:, :, None].expand(-1, -1, clients))
            torch.threshold_(cover.sub_(taken), least, 0)
            if bonus is not None:  # what is taken has nothing left of a gain, but of that
                whole[..., -1].scatter_(1, picks[-1], -torch.inf)
        gain = whole.sum(dim=2)
        score, pick = (gain if factor is None else gain * factor).max(dim=1, keepdim=True)
        picks.append(pick)
        scores.append(score)
    if not picks:
        return torch.zeros(batch, 0, dtype=torch.long, device=cover.device)
    if bonus is not None:
        return torch.cat(picks, dim=1)
    gains = torch.cat(scores, dim=1)
    gained = gains > 0
    if not least:  # clients may count as little as one of thousands
        gained &= gains >= NEGLIGIBLE * gains[:, :1].clamp(max=1)
    in_order = torch.arange(size, device=cover.device).expand(batch, -1)
    return picks_then_rest(torch.cat(picks, dim=1), gained.cumprod(dim=1), in_order)
