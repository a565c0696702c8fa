"""SinkPruner: its sanitizer on recorded features; the cuts inside the decoder have no record."""

import numpy as np
import torch

from llava.pruning import build_pruner
from llava.pruning.sinkpruner import sanitize, sink_token
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.methods import given


def build(case, folder):
    return build_pruner("sinkpruner", **given(case["args"], "visual_token_num", "text_pruner"))


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    vision = model.get_vision_tower().tokens(pixels.flatten(0, -4), pruner.needs)
    pools = pruner.pools(pruner.visual_token_num, vision.features.shape[1])
    found = sanitize(vision.features, vision.salience, *pools, pruner.picks_per_round)
    for name, own in zip(("high", "res", "div_order"), found, strict=True):
        own = own[0] if name == "div_order" else own[0].sort().values
        report.equal(name, own, recorded[name])
    return True


def check_sanitize(case, folder, recorded, report):
    args = case["args"]
    features, salience = (torch.tensor(recorded[n]).float() for n in ("features", "saliency"))
    pruner = build_pruner(
        "sinkpruner",
        sink_ratio=args["rho"],
        salient_token_num=args["k_res"],
        diverse_token_num=args["k_div"],
        picks_per_round=args["batch"],
    )
    pools = pruner.pools(1, features.shape[1])
    high, salient, diverse = sanitize(features, salience, *pools, pruner.picks_per_round)
    report.equal("expected_high", high.sort(dim=1).values, recorded["expected_high"])
    report.equal("expected_res", salient.sort(dim=1).values, recorded["expected_res"])
    report.equal("expected_div_order", diverse, recorded["expected_div_order"])
    sequence = [salient.sort(dim=1).values, diverse.sort(dim=1).values]
    if pools[0]:
        report.close("sink", sink_token(features, high), recorded["expected_sink"], SCORES_ATOL)
        sequence = [torch.full_like(high[:, :1], -1), *sequence]
    wanted = recorded["expected_sequence"]
    own = torch.cat(sequence, dim=1).numpy()
    padding = np.full((len(own), wanted.shape[1] - own.shape[1]), -2)
    report.equal("expected_sequence", np.concatenate([own, padding], axis=1), wanted)


FUNCTIONS = {"sanitize": check_sanitize}
