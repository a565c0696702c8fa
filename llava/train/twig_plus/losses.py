"""The losses of a twig with a pruning head: of its distillation, and of its reinforcement.

Letters in shapes: `N` supervised tokens, `V` visual tokens (or the vocabulary, where it says so),
`G` selections of a group, `r` tokens of a selection.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: added to both distributions before their logarithm
EPSILON = 1e-9
#: added to the spread of a group's costs: equal ones are worth nothing, and not infinitely much
SMALLEST_SPREAD = 1e-6


def token_divergences(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """(N,) divergence of the student's next token from the teacher's; logits (N, vocabulary)."""
    log_b = (teacher.float() / temperature).log_softmax(dim=-1)
    log_p = (student.float() / temperature).log_softmax(dim=-1)
    return temperature**2 * (log_b.exp() * (log_b - log_p)).sum(dim=-1)


def prediction_loss(divergences: Tensor, ceiling: float) -> Tensor:
    """Mean of `divergences` (N,) in units of `ceiling`; one above it counts as the ceiling, with a
    gradient that is as much smaller, and is not cut off."""
    weight = ceiling / divergences.detach().clamp(min=ceiling)  # near 0 rounding may go below it
    return (weight * divergences).sum() / (ceiling * max(1, len(divergences)))


def score_divergence(teacher: Tensor, student: Tensor, real: Tensor) -> Tensor:
    """(B,) divergence of the student's scores of visual tokens from the teacher's, (B, V) each; 0
    where `real` (B, V) is False everywhere."""
    teacher, student = teacher + EPSILON, student + EPSILON
    return (teacher * (teacher.log() - student.log())).masked_fill(~real, 0).sum(dim=1)


def budget_chances(count: int, progress: float, beta_max: float, power: float) -> Tensor:
    """(count,) chance of every budget, the smallest first: all alike at the beginning, in the end
    nearly always the smallest.

    progress: share of the training that lies behind
    """
    beta = beta_max * min(progress, 1.0) ** power
    return torch.softmax(-beta * torch.arange(count, dtype=torch.float64), dim=0)


def log_chances(scores: Tensor, chosen: Tensor) -> Tensor:
    """(G,) logarithm of the chance of drawing the tokens `chosen` (G, r) in this order, without
    putting any back, from scores (V,) that sum to 1 (Plackett-Luce).

    What is left before every draw is summed up from the end, so that no difference of nearly equal
    numbers is taken.
    """
    own = scores[chosen]  # (G, r)
    left = torch.ones(len(chosen), len(scores), dtype=torch.bool, device=scores.device)
    left = left.scatter(1, chosen, False)
    rest = (scores * left).sum(dim=1, keepdim=True)
    mass = rest + own.flip(1).cumsum(dim=1).flip(1)
    tiny = torch.finfo(scores.dtype).tiny
    return (own.clamp(min=tiny).log() - mass.clamp(min=tiny).log()).sum(dim=1)


def draw_in_order(scores: Tensor, count: int, noise: Tensor) -> Tensor:
    """(G, count) tokens drawn from scores (V,) without putting any back, in the order in which they
    were drawn: those with the largest log score + noise.

    noise: (G, V) of the standard Gumbel distribution
    """
    logs = scores.clamp(min=torch.finfo(scores.dtype).tiny).log()
    return (logs + noise).topk(count, dim=1).indices


def worth(costs: Tensor) -> Tensor:
    """(G,) how far every cost lies below the mean of its group, in standard deviations."""
    spread = costs.std() if len(costs) > 1 else costs.new_zeros(())
    return -(costs - costs.mean()) / (spread + SMALLEST_SPREAD)


def divergence_weight(kept: int, least: int, most: int, squared: bool = True) -> float:
    """Weight of the divergence from the teacher in the reinforcement: from 1 with the smallest
    budget to 2 with the largest; the release multiplies by it twice."""
    weight = 1.0 if most == least else 1 + (kept - least) / (most - least)
    return weight**2 if squared else weight


#: tokens that enter the layers between both cuts, in the release: of 576, with 2 layers in front
#: of the first cut, 24 in front of the second, and 32 in all
RELEASED_KEPT, RELEASED_TOKENS = (41, 72, 103, 134, 165, 196, 227), 576
RELEASED_FIRST, RELEASED_WIPE, RELEASED_LAYERS = 2, 24, 32


def candidates(tokens: int, first: int, wipe: int, layers: int) -> list[int]:
    """How many of `tokens` a selection may keep, in ascending order: the released numbers, or those
    with the same share of the tokens on average over the decoder's layers.

    first, wipe: layers in front of which tokens are selected, and all that are left go
    """
    whole = RELEASED_LAYERS * RELEASED_TOKENS
    kept = []
    for number in RELEASED_KEPT:
        sums = RELEASED_FIRST * RELEASED_TOKENS + number * (RELEASED_WIPE - RELEASED_FIRST)
        wanted = layers * tokens * sums - first * tokens * whole  # times `whole`
        kept.append(min(max(math.ceil(wanted / (whole * (wipe - first))), 1), tokens))
    return sorted(set(kept))
