"""Density-peak clustering (DPC-KNN) of token vectors, batched over groups of different sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .captured import captured
from .ops import denser, top_stable


@captured
def cluster(tokens: Tensor, valid: Tensor, num_clusters: Tensor, most: int) -> tuple[Tensor, ...]:
    """Clusters `tokens` (G, Q, D), of which `valid` (G, Q) are real, into `num_clusters` (G,).

    most: the largest of `num_clusters`. A centre is a token with dense surroundings, far from any
    denser one; of equal density the earlier token counts as denser. Every token joins the nearest
    centre. Returns in fp32
    centres (G, most) tokens, best first; entries from `num_clusters` on mean nothing
    assign  (G, Q) which centre a token belongs to
    merged  (G, most, D) sum of the members / (their number + 1e-6)
    density, distance (G, Q) of every token, distance being that to the nearest denser one
    """
    x, size = tokens.float(), tokens.shape[1]
    # Differences, not the matmul form: the diagonal is 0 and the matrix symmetric to the bit.
    apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5
    absent = ~valid
    nothing = absent[:, :, None] | absent[:, None, :]
    reach = apart.masked_fill(nothing, torch.inf)
    slot = torch.arange(most, device=x.device)
    unused = slot >= num_clusters[:, None]  # (G, most)

    near = reach.sort(dim=-1).values[..., :most].square().masked_fill(unused[:, None], 0.0)
    near = near.sum(dim=-1) / num_clusters[:, None]
    density = torch.exp(-near).masked_fill(absent, -1.0)
    distance = torch.where(denser(density), reach, torch.inf).amin(dim=-1)
    farthest = apart.masked_fill(nothing, 0.0).amax(dim=(1, 2))
    distance = torch.where(distance.isinf(), farthest[:, None], distance)

    rating = (distance * density).masked_fill(absent, -1.0)
    centres = top_stable(rating, most)
    to_centre = apart.gather(2, centres[:, None].expand(-1, size, -1))
    assign = to_centre.masked_fill(unused[:, None], torch.inf).argmin(dim=-1)
    target = centres.masked_fill(unused, size)  # a spare column takes what means nothing
    assign = F.pad(assign, (0, 1)).scatter(1, target, slot.expand_as(target))[:, :size]
    member = (assign[..., None] == slot) & valid[..., None]  # (G, Q, most)
    total = member.float().transpose(1, 2) @ x
    merged = total / (member.sum(dim=1)[..., None] + 1e-6)
    return centres, assign, merged, density, distance
