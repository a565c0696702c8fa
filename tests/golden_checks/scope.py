"""SCOPE's recorded cases: order of the picks, and what each scored."""

import torch

from llava.pruning import Pruner, build_pruner
from llava.pruning.ops import normalize
from tests.golden_checks.methods import budget, check_order, given, tensors, tokens_of


def build(case, folder) -> Pruner:
    return build_pruner(
        "scope", visual_token_num=budget(case), **given(case["args"], "alpha", "combine")
    )


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    vision = model.get_vision_tower().tokens(pixels, pruner.needs)
    count = len(recorded["select_order"])
    report.equal(
        "select_order", pruner.pick(vision, slice(None), count)[0], recorded["select_order"]
    )
    return True


def check_select(case, folder, recorded, report):
    args = case["args"]
    features, saliency = tensors(recorded, "features", "saliency")
    pruner = build_pruner("scope", **given(args, "alpha", "combine"))
    vision = tokens_of(features, salience=saliency)
    order = pruner.pick(vision, slice(None), args["tokens"])
    check_order(order, recorded, report)
    for row, own in enumerate(order):
        found = scores(features[row].double(), saliency[row].double() ** args["alpha"], own)
        if args["combine"] == "add":
            found = found[0] + found[1]
        else:
            found = found[0] * found[1]
        report.close("step_score", found, recorded["step_score"][row, : len(own)], 1e-4, 1e-5)


def scores(features, weight, order) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain in coverage and weight of every pick."""
    unit = normalize(features).double()
    similarity, covered, gains = unit @ unit.T, torch.zeros(len(unit)).double(), []
    for pick in order:
        gains.append((similarity[pick] - covered).clamp(min=0).sum())
        covered = torch.maximum(covered, similarity[pick])
    return torch.stack(gains), weight[order]


FUNCTIONS = {"select": check_select}
