"""V2Drop: its choice on recorded states; layers and what they keep by our names."""

import torch

from llava.pruning import build_pruner
from llava.pruning.ops import top_stable
from llava.pruning.v2drop import schedule, variation
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.methods import given


def build(case, folder):
    return build_pruner("v2drop", **given(case["args"], layers="layer_list", keep="keep_list"))


def check_select(case, folder, recorded, report):
    before, after = (torch.tensor(recorded[name]).float() for name in ("before", "after"))
    found = variation(before, after)
    report.close("expected_variation", found, recorded["expected_variation"], SCORES_ATOL)
    count = schedule(found.shape[1], [1], [case["args"]["keep"]], 2)[1]
    kept = top_stable(found, count).sort(dim=1).values
    report.equal("expected_keep", kept, recorded["expected_keep"])


FUNCTIONS = {"select": check_select}
