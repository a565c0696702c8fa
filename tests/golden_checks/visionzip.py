"""VisionZip's recorded cases: scores, dominant patches, assignment, and the order of the tiles."""

import numpy as np
import torch

from llava.pruning import Pruner, build_pruner
from llava.pruning.visionzip import assign, compress
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.methods import given

TOKENS_ATOL = 1e-4


def build(case, folder) -> Pruner:
    counts = given(case["args"], "dominant", "contextual")
    return build_pruner("visionzip", **(counts or given(case["args"], total="visual_token_num")))


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    vision = model.get_vision_tower().tokens(pixels.flatten(0, -4), pruner.needs | pruner.wants)
    vision.crops_in_budget = len(vision.features)
    heads = vision.num_heads
    attention = vision.salience * heads
    keys = vision.keys.unflatten(-1, (heads, -1)).mean(dim=2)
    report.close("cls_attn_sum", attention, recorded["cls_attn_sum"], SCORES_ATOL)
    report.close("metric", keys, recorded["metric"][:, 1:], SCORES_ATOL)
    dominant, contextual = pruner.counts(keys.shape[1], vision.crops_in_budget)
    compare(vision.features, attention, keys, dominant, contextual, recorded, report)
    tokens = pruner.after_encoder(vision)
    report.close(
        "vision_tokens_before_projector",
        tokens.features,
        recorded["vision_tokens_before_projector"],
        TOKENS_ATOL,
    )
    if "tile_dominant_order" in recorded:
        start = dominant + 1 + contextual  # behind the overview
        order = trace.visual_positions[0][start : start + len(recorded["tile_dominant_order"])]
        patches = keys.shape[1]
        order = torch.stack([order // patches, order % patches], dim=1)
        report.equal("tile_dominant_order", order, recorded["tile_dominant_order"])
    recorded.pop("keep_indices", None)  # the dominant patches once more
    return True


def compare(features, score, keys, dominant, contextual, recorded, report):
    """Patches and assignment against the recorded ones; functions record more than one answer."""
    patches, _, _ = compress(features, score, keys, dominant, contextual)
    report.equal(
        "dominant", patches, named(recorded, "expected_dominant", "dominant_patch_indices")
    )
    everything = np.arange(keys.shape[1])
    rest = torch.tensor(np.stack([np.setdiff1d(everything, row.numpy()) for row in patches]))
    if contextual == 0:
        return
    is_target, nearest = assign(
        keys.gather(1, rest[..., None].expand(-1, -1, keys.shape[2])), contextual
    )
    targets = named(recorded, "expected_targets", "contextual_target_patch_indices")
    report.equal("targets", rest[:, is_target], targets)
    report.equal(
        "merged", rest[:, ~is_target], named(recorded, "expected_merged", "merged_patch_indices")
    )
    report.equal(
        "assigned", nearest[:, ~is_target], named(recorded, "expected_assign", "merged_assign")
    )


def named(recorded, *names):
    return next(recorded[name] for name in names if name in recorded)


def check_compress(case, folder, recorded, report):
    hidden, attention, metric = (
        torch.tensor(recorded[name]).float() for name in ("hidden", "cls_attn", "metric")
    )
    features, keys, score = hidden[:, 1:], metric[:, 1:], attention.sum(dim=1)
    args = case["args"]
    pruner = build_pruner(
        "visionzip", dominant=args["dominant_patches"] + 1, contextual=args["contextual"]
    )
    counts = pruner.counts(features.shape[1], 1)
    compare(features, score, keys, *counts, recorded, report)
    _, _, tokens = compress(features, score, keys, *counts)
    tokens = torch.cat([hidden[:, :1], tokens], dim=1)
    report.close("expected_tokens", tokens, recorded["expected_tokens"], TOKENS_ATOL)


FUNCTIONS = {"compress": check_compress}
