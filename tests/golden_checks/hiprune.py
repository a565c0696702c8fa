"""HiPrune: names of its options, the attention of the two layers, and the anchors."""

from llava.pruning import build_pruner
from llava.pruning.ops import top_stable
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.methods import given


def build(case, folder):
    options = given(case["args"], "alpha", "object_layer", retention="visual_token_num")
    return build_pruner("hiprune", **options)


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    crops = pixels.flatten(0, -4)
    layers = model.get_vision_tower().tokens(crops, pruner.needs, pruner).layers
    means = [layers[number].get("attention_mean") for number in sorted(layers)]
    means = [mean for mean in means if mean is not None]
    middle, deep = means[0], means[-1]
    report.close("attn_mid", middle, recorded["attn_mid"], SCORES_ATOL)
    report.close("attn_deep", deep, recorded["attn_deep"], SCORES_ATOL)
    anchors = top_stable(middle, recorded["anchors"].shape[1])
    report.equal("anchors", anchors, recorded["anchors"])
    report.equal("tokens", len(trace.visual_positions[0]), case["args"]["tokens"])
    return True
