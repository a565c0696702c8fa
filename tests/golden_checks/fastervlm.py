"""FasterVLM: the record counts tokens per crop, we count them per image of five crops."""

from llava.pruning import build_pruner
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.methods import NEXT_CROPS, budget


def build(case, folder):
    crops = NEXT_CROPS if case["checkpoint"].endswith("v1.6") else 1
    return build_pruner("fastervlm", visual_token_num=budget(case, crops))


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    crops = pixels.flatten(0, -4)
    vision = model.get_vision_tower().tokens(crops, pruner.needs)
    report.close("attn_cls", vision.salience, recorded["attn_cls"], SCORES_ATOL)
    return True
