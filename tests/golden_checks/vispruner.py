"""VisPruner's recorded cases: tokens per crop; selections compare where the record is exact."""

from dataclasses import replace

import numpy as np
import torch

from llava.pruning import Pruner, VisionTokens, build_pruner
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.methods import NEXT_CROPS, budget, given


def build(case, folder) -> Pruner:
    """The record counts tokens per crop, we count them per image."""
    crops = NEXT_CROPS if (case.get("checkpoint") or "").endswith("v1.6") else 1
    options = given(case["args"], "important_ratio")
    return build_pruner("vispruner", visual_token_num=budget(case, crops), **options)


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    """Scores, important tokens and stable tokens always; the whole set where it is exact.

    Rounding decides between near-equal tokens, and the recorded trials of what is stable were few:
    a stable token may be lost to our rounding, but not in most of our own trials.
    """
    crops = pixels.flatten(0, -4)
    vision = model.get_vision_tower().tokens(crops, pruner.needs)
    vision.crops_in_budget = len(crops)
    attention = vision.cls_attention.mean(dim=1)
    report.close("attn_cls", attention, recorded["attn_cls"], SCORES_ATOL)
    num_crops, num_patches = recorded["keep_mask"].shape
    kept = torch.zeros(num_crops * num_patches, dtype=torch.bool)
    kept[trace.visual_positions[0]] = True
    kept = kept.view(num_crops, num_patches).numpy()
    report.equal("kept per crop", kept.sum(1), recorded["keep_mask"].sum(1))
    important = np.zeros_like(kept)
    np.put_along_axis(important, recorded["important_indices"], True, axis=1)
    report.equal("kept important tokens", kept & important, important)
    lost = recorded["stable_core_mask"] & ~kept
    if lost.any():
        votes = kept_with_noise(pruner, vision)[lost]
        report.true("a stable token is lost in most trials", (votes > 0.5).all())
    exact = recorded["tile_exact"]
    report.equal("kept tokens of exact crops", kept[exact], recorded["keep_mask"][exact])
    num_important = recorded["important_indices"].shape[1]
    slow = slow_vispruner(vision.features, attention, num_important, int(kept[0].sum()))
    report.equal("kept tokens, against the slow reference", kept, slow)
    same = bool((kept == recorded["keep_mask"]).all())
    if case["exact"]:
        report.true("an exact case keeps other tokens", same)
    return same


def kept_with_noise(pruner, vision, trials: int = 15, noise: float = 1e-6) -> np.ndarray:
    """Share of trials (crops, N) in which a token is kept when features carry relative noise."""
    generator = torch.Generator().manual_seed(0)
    votes = torch.zeros(vision.features.shape[:2])
    for _ in range(trials):
        factor = 1 + noise * torch.randn(vision.features.shape, generator=generator)
        index = pruner.select(replace(vision, features=vision.features * factor))
        votes.scatter_add_(1, index, torch.ones_like(index, dtype=votes.dtype))
    return (votes / trials).numpy()


def slow_vispruner(features, attention, num_important: int, num_keep: int) -> np.ndarray:
    """Mask (crops, N) of the tokens the paper's rule keeps, token by token in plain Python."""
    unit = features.float() / features.float().norm(dim=-1, keepdim=True)
    similarity = (unit @ unit.transpose(1, 2)).numpy()
    mask = np.zeros(attention.shape, dtype=bool)
    for crop, scores in enumerate(attention.tolist()):
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        rest = order[num_important:] if num_keep > num_important else []
        while len(rest) > num_keep - num_important:
            candidates, partners = rest[::2], rest[1::2]
            drop = min(8, len(rest) - (num_keep - num_important), len(candidates))
            closest = {a: similarity[crop, a, partners].max() for a in candidates}
            candidates.sort(key=lambda a: -closest[a])
            rest = candidates[drop:] + partners
        mask[crop, order[:num_important] + rest] = True
    return mask


def check_select(case, folder, recorded, report):
    if "attention" in recorded:  # a tower without class token: mean over all queries
        attention = torch.tensor(recorded["attention"]).float().mean(dim=2)
        report.close("score", attention.mean(dim=1), recorded["score"], SCORES_ATOL)
    else:
        attention = torch.tensor(recorded["attn"]).float()
    features = torch.tensor(recorded["features"]).float()
    count = features.shape[1]
    vision = VisionTokens(
        features=features,
        positions=torch.arange(count).expand(len(features), -1),
        grid=(1, count),
        cls_attention=attention,
    )
    keep = build(case, folder).select(vision).sort(dim=1).values
    report.equal("expected_keep", keep, recorded["expected_keep"].reshape(keep.shape[0], -1))


FUNCTIONS = {"select": check_select, "siglip_select": check_select}
