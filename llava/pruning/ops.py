"""Routines on tensors, on numbers of tokens and on layers that belong to no single method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from .precision import full_precision

Number = TypeVar("Number", int, float)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, T) of `x` (B, N, C) -> (B, T, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, C) -> (B, H, T, C / H)."""
    batch, size, width = x.shape
    return x.view(batch, size, num_heads, width // num_heads).transpose(1, 2)


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """Every key/value head repeated for the query heads it serves: (B, G, K, d) -> (B, H, K, d)."""
    groups = num_heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def top_stable(score: Tensor, count: int) -> Tensor:
    """Places (B, count) of the largest scores (B, N), best first; ties go to the lower place."""
    return score.argsort(dim=1, descending=True, stable=True)[:, :count]


def normalize(x: Tensor) -> Tensor:
    """fp32 rows of unit length; a zero row stays zero."""
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


#: what rounding in fp32 may leave where there is nothing: no span between cosines, no gain in
#: coverage, no share of a token's own weight
NEGLIGIBLE = 1e-6


def cosines(x: Tensor) -> Tensor:
    """(B, N, N) fp32 cosines of the rows of `x` (B, N, C), 0 where one of them is zero. Copies have
    1, which rounding would leave a little off."""
    unit = normalize(x)
    with full_precision(x.device):
        found = unit @ unit.transpose(1, 2)
    return found.masked_fill_(found > 1 - NEGLIGIBLE, 1)


def first_copies(alike: Tensor) -> Tensor:
    """(B, N) of the copies of every token, by their `cosines` (B, N, N), the first one; what they
    get by different sums differs by rounding, and does not where the first one's stands for all."""
    same = alike == 1
    same.diagonal(dim1=1, dim2=2).fill_(True)  # a zero row resembles nothing, not even itself
    return same.int().argmax(dim=2)


def range_in_image(score: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor]:
    """Of scores (B, N) of crops, the lowest and the span (B, 1) over all crops of their image."""

    def over_image(values: Tensor, how: str) -> Tensor:
        best = torch.zeros_like(values).scatter_reduce_(
            0, image_index, values, how, include_self=False
        )
        return best[image_index][:, None]

    low = over_image(score.amin(dim=1), "amin")
    return low, over_image(score.amax(dim=1), "amax") - low


def hides_tokens(valid: Tensor | None) -> bool:
    """Whether padding, where `valid` (B, S) is False, stands before a token; behind all tokens the
    causal mask hides it anyway. Waits for the device."""
    return valid is not None and bool((valid[:, 1:] & ~valid[:, :-1]).any())


def true_first(mask: Tensor) -> Tensor:
    """Places (..., S) of `mask` (..., S): where it is True, then where it is not, each in order."""
    return mask.view(torch.uint8).argsort(dim=-1, descending=True, stable=True)


def true_last(mask: Tensor) -> Tensor:
    """Likewise, first where it is not."""
    return mask.view(torch.uint8).argsort(dim=-1, stable=True)


def ranks(score: Tensor) -> Tensor:
    """How many tokens of its row beat each token, (B, S) -> (B, S); equal scores rank in order."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def rank_within_groups(score: Tensor, group: Tensor) -> Tensor:
    """How many tokens of its own group beat each token: 0 for the best. Shapes (B, S) -> (B, S).

    Tokens compete with tokens of the same row and the same `group`; equal scores rank in order of
    place. Two stable sorts, no loop over rows or groups.
    """
    by_score = score.argsort(dim=1, descending=True, stable=True)
    sorted_group, order = group.gather(1, by_score).sort(dim=1, stable=True)
    first = torch.searchsorted(sorted_group, sorted_group)  # place where the own group begins
    own = torch.arange(score.shape[1], device=score.device) - first
    return torch.empty_like(order).scatter_(1, by_score.gather(1, order), own)


def denser(density: Tensor) -> Tensor:
    """(B, N, N) True where the token of the last axis has a higher `density` (B, N) than that of
    the middle one, or the same and stands before it."""
    rank = ranks(density)
    return rank[:, None, :] < rank[:, :, None]


def picks_then_rest(picks: Tensor, good: Tensor, rest: Tensor) -> Tensor:
    """(B, T) `picks` as long as they are `good` (ones, then zeros); from there on the places that
    are not among them, in the order of `rest` (B, N)."""
    taken = torch.zeros_like(rest).scatter_reduce(1, picks, good, "amax")
    others = rest.gather(1, taken.gather(1, rest).argsort(dim=1, stable=True))
    rank = torch.arange(picks.shape[1], device=picks.device) - good.sum(dim=1, keepdim=True)
    return torch.where(good.bool(), picks, others.gather(1, rank.clamp(min=0)))


def on_device(numbers: Sequence, device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Numbers of the host, whole ones, as a tensor; the host does not wait for the device."""
    made = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return made.to(device, non_blocking=True)


def lookup(rule: Callable[[int, Number], int], values: Tensor, number: Number, most: int) -> Tensor:
    """`rule(value, number)` of whole values from 0 to `most`, in the arithmetic of Python.

    From a table that is made once: float64 tensors, which would give the same, are not there on
    every device. rule: a function of a module, by which tables are remembered
    """
    return _table(rule, number, most, values.device)[values]


@lru_cache(maxsize=64)
def _table(
    rule: Callable[[int, Any], int], number: float, most: int, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):  # it outlives the mode
        return torch.tensor([rule(value, number) for value in range(most + 1)], device=device)


def shared_out(shares: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Tokens of every crop, `total` together, or all there are: by its share, rounded down, one at
    least where that is possible and no more than its size; what is left goes one by one to the
    largest fractions, what is too much comes from the largest crop. Ties: the lower one."""
    crops, total = range(len(sizes)), min(total, sum(sizes))
    shares = shares if sum(shares) > 0 else [1.0] * len(sizes)
    ideal = [share / sum(shares) * total for share in shares]
    least = 1 if total >= sum(size > 0 for size in sizes) else 0
    counts = [min(max(int(x), least), size) for x, size in zip(ideal, sizes, strict=True)]
    by_fraction = sorted(crops, key=lambda n: -(ideal[n] % 1))
    while (left := total - sum(counts)) > 0:
        for crop in [n for n in by_fraction if counts[n] < sizes[n]][:left]:
            counts[crop] += 1
    while sum(counts) > total:
        counts[max(crops, key=counts.__getitem__)] -= 1
    return counts


def interpolate(points: Mapping[Any, Sequence[float]], x: float) -> list[float]:
    """The values at `x`, on straight lines between the points next to it, x -> values; `x` lies
    between the first and the last of them."""
    above = min(point for point in points if point >= x)
    below = max(point for point in points if point <= x)
    part = 0.0 if above == below else (x - below) / (above - below)
    pairs = zip(points[below], points[above], strict=True)
    return [low + part * (high - low) for low, high in pairs]


def scale_layer(layer: int, num_layers: int, reference: int = 32) -> int:
    """The layer at the same relative depth of a model with `num_layers` layers.

    layer: what the paper gives for `reference` layers (32 in a 7B decoder, 24 in a CLIP-L tower).
    Rounded to the nearest layer, halves to the even one; a layer above 0 stays above 0.
    """
    return min(max(round(layer * num_layers / reference), min(layer, 1)), num_layers - 1)


def scale_layers(layers: Sequence[int], num_layers: int, reference: int = 32) -> tuple[int, ...]:
    """`scale_layer` of ascending layers; where two would meet, the later one moves on."""
    scaled: list[int] = []
    for layer in layers:
        place = scale_layer(layer, num_layers, reference)
        scaled.append(max(place, scaled[-1] + 1) if scaled else place)
    return tuple(scaled)


def middle_places(count: int, size: int, device=None) -> Tensor:
    """(count,) place, of `size` in a row, that the middle of each of `count` parts lies on."""
    return (2 * torch.arange(count, device=device) + 1) * size // (2 * count)
