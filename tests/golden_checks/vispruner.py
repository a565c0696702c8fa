"""VisPruner's recorded cases: tokens per crop; selections compare where the record is exact."""

import numpy as np
import torch

from llava.pruning import Pruner, VisionTokens, build_pruner
from llava.pruning.ops import normalize
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.methods import NEXT_CROPS, budget, given


def build(case, folder) -> Pruner:
    """The record counts tokens per crop, we count them per image."""
    crops = NEXT_CROPS if (case.get("checkpoint") or "").endswith("v1.6") else 1
    options = given(case["args"], "important_ratio")
    return build_pruner("vispruner", visual_token_num=budget(case, crops), **options)


@torch.no_grad()  # layers compute otherwise for gradients, and near ties would not be the same
def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    """Scores, important tokens and counts always; the whole set where the record is exact.

    Rounding decides between near-equal tokens, and one decision changes all that follow. Rounding
    differs between kinds of CPU, so where the record is not exact, what it says of the diverse
    tokens is no property of the method (nor is `stable_core_mask`, found in few trials on one
    machine). There the diverse tokens are compared with the paper's rule, worked out slowly on the
    similarities that our own features have here.
    """
    crops = pixels.flatten(0, -4)
    vision = model.get_vision_tower().tokens(crops, pruner.needs)
    vision.crops_in_budget = len(crops)
    attention = vision.salience
    report.close("attn_cls", attention, recorded["attn_cls"], SCORES_ATOL)
    num_crops, num_patches = recorded["keep_mask"].shape
    kept = torch.zeros(num_crops * num_patches, dtype=torch.bool)
    kept[trace.visual_positions[0]] = True
    kept = kept.view(num_crops, num_patches).numpy()
    report.equal("kept per crop", kept.sum(1), recorded["keep_mask"].sum(1))
    important = np.zeros_like(kept)
    np.put_along_axis(important, recorded["important_indices"], True, axis=1)
    report.equal("kept important tokens", kept & important, important)
    exact = recorded["tile_exact"]
    report.equal("kept tokens of exact crops", kept[exact], recorded["keep_mask"][exact])
    num_important = recorded["important_indices"].shape[1]
    similarity = cosine_similarity(vision.features, report)
    slow = slow_vispruner(similarity, attention, num_important, int(kept[0].sum()))
    report.equal("kept tokens, against the slow reference", kept, slow)
    same = bool((kept == recorded["keep_mask"]).all())
    if case["exact"]:
        report.true("an exact case keeps other tokens", same)
    return same


def cosine_similarity(features, report) -> np.ndarray:
    """(crops, N, N) fp32 as the method computes it, bit for bit; compared with double precision."""
    unit = normalize(features)
    similarity = unit @ unit.transpose(1, 2)
    wide = torch.nn.functional.normalize(features.double(), dim=-1)
    report.close("similarity", similarity, wide @ wide.transpose(1, 2), 1e-5)
    return similarity.numpy()


def slow_vispruner(similarity, attention, num_important: int, num_keep: int) -> np.ndarray:
    """Mask (crops, N) of the tokens the paper's rule keeps, token by token in plain Python."""
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
        salience=attention.mean(dim=1),
    )
    keep = build(case, folder).select(vision).sort(dim=1).values
    report.equal("expected_keep", keep, recorded["expected_keep"].reshape(keep.shape[0], -1))


FUNCTIONS = {"select": check_select, "siglip_select": check_select}
