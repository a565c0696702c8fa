"""AdaptPrune: the recorded names of its options, its cues, and the order of the picks."""

import numpy as np
import torch

from llava.pruning import ImageTokens, build_pruner
from llava.pruning.adaptprune import cells_of
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.e2e import cut_layer, entering
from tests.golden_checks.methods import budget, given

SIGMAS = ("distance_limit", "distance_sigma", "similarity_sigma", "prior_sigma")


def build(case, folder):
    options = given(case["args"], *SIGMAS, prune_layer_K="layer", keep_ratio="keep_ratio")
    if case["args"].get("visual_token_num") == 0:  # nothing stays: with us a share of 0
        options["keep_ratio"] = 0.0
    elif "visual_token_num" in case["args"]:
        options["visual_token_num"] = budget(case)
    return build_pruner("adaptprune", **options)


def cells(side: int) -> torch.Tensor:
    """(1, side * side, 5) cells of an unpruned square grid."""
    places = torch.arange(side * side)
    grid = ImageTokens(places, places, places, len(places), blocks=((side, side),))
    return cells_of(grid)[None]


def check_cues(pruner, recorded, report):
    """Prior, score map and order of the picks, from the recorded attention row and keys."""
    attention = torch.tensor(recorded["attn_row"])[None]
    places = cells(round(attention.shape[1] ** 0.5))
    prior = pruner.prior(places)
    if "prior" in recorded:
        report.close("prior", prior.flatten(), recorded["prior"].flatten(), SCORES_ATOL)
    score = (prior * attention).flatten()
    report.close("score_map", score, recorded["score_map"].flatten(), 1e-7, 1e-4)
    keys = torch.tensor(recorded["keys_raw"])[None]
    rounds = min(pruner.left_of(attention.shape[1]), attention.shape[1])
    order = pruner.pick(attention, keys, places, rounds)[0]
    if recorded.get("order_strict", True):
        report.equal("selection_order", order, recorded["selection_order"])
    report.equal("picked set", order.sort().values, np.sort(recorded["selection_order"]))


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    """The recorded cues give the recorded picks, and so does the model."""
    check_cues(pruner, recorded, report)
    start, kept = int(recorded["image_pos"]), entering(trace, cut_layer(pruner, model))
    patches = len(recorded["attn_row"])
    visual = kept[(kept >= start) & (kept < start + patches)] - start
    report.equal("keep_indices_visual", visual, np.sort(recorded["keep_indices_visual"]))
    if "position_ids_pruned" in recorded:
        report.equal("position_ids_pruned", kept, recorded["position_ids_pruned"])
    return True


def check_select(case, folder, recorded, report):
    check_cues(build(case, folder), recorded, report)


FUNCTIONS = {"select": check_select}
