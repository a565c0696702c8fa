"""Group-relative policy optimisation: what an answer is worth within its group, and the losses.

`B` answers, `T` tokens of the longest, in shapes. The answers to one question stand in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.pruning.ops import true_last

#: added to the spread of a group, so that equal scores are worth nothing and not infinitely much
SMALLEST_SPREAD = 1e-4


def advantages(scores: Tensor, size: int) -> Tensor:
    """(B,) how far every score lies above the mean of its group, in standard deviations.

    scores: (B,) groups of `size` one behind the other; NaN where there is no verdict: such an
            answer is worth nothing, and the others are compared without it
    """
    groups = scores.view(-1, size)
    known = ~groups.isnan()
    count = known.sum(dim=1, keepdim=True)
    filled = groups.masked_fill(~known, 0)
    mean = filled.sum(dim=1, keepdim=True) / count.clamp(min=1)
    off = (filled - mean).masked_fill(~known, 0)
    spread = (off.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return (off / (spread + SMALLEST_SPREAD)).flatten()


def completion_mask(ids: Tensor, ends: list[int]) -> Tensor:
    """(B, T) True on the tokens of an answer, its first end mark included; all of them where an
    answer has none.

    ids: (B, T) padded on the right behind an end mark
    """
    end = torch.isin(ids, ids.new_tensor(ends))
    return end.cumsum(dim=1) - end.long() == 0


def cut_to(limit: int | None, lengths: Tensor, mask: Tensor) -> Tensor:
    """(B, T) `mask` without the tokens that lie beyond `limit` in their own row, counted from the
    beginning of its prompt.

    lengths: (B,) tokens of the prompts, which are never cut
    """
    if limit is None:
        return mask
    places = torch.arange(mask.shape[1], device=mask.device)
    return mask & (lengths[:, None] + places < limit)


def packed(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Places (B, L) of the tokens where `valid` (B, S) is True, padded on the left to the longest
    row, and where they are tokens (B, L)."""
    order = true_last(valid)
    order = order[:, valid.shape[1] - int(valid.sum(dim=1).max()) :]
    return order, valid.gather(1, order)


def mean_over_answers(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over answers of the mean over their tokens: a long answer counts as one."""
    tokens = mask.sum(dim=1).clamp(min=1)
    return (values.masked_fill(~mask, 0).sum(dim=1) / tokens).mean()


def reward_loss(log_probs: Tensor, worth: Tensor, mask: Tensor) -> Tensor:
    """Minus the advantage `worth` (B,), with the gradient of the policy: nothing is clipped, as
    every answer is used for one step, which the model that gave it takes.

    log_probs: (B, T) of the tokens that were sampled
    """
    ratio = (log_probs - log_probs.detach()).exp()  # 1, with the gradient of log_probs
    return mean_over_answers(-ratio * worth[:, None], mask)


def distance_loss(log_probs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """An estimate of the KL divergence from the reference that is never negative, per token."""
    above = (reference - log_probs).masked_fill(~mask, 0)
    return mean_over_answers(above.exp() - above - 1, mask)
