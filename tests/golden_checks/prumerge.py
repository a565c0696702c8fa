"""PruMerge: names of its options, attention, kept patches, and tokens before the projector."""

from llava.pruning import build_pruner
from llava.pruning.prumerge import class_attention
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.methods import given

#: fixed share of the trained checkpoints
TRAINED_RATIO = 1 / 8


def build(case, folder):
    options = given(case["args"], "plus", "reduction_ratio")
    options.setdefault("plus", case["method"].endswith("+"))
    if case["args"].get("adaptive") is False:
        options.setdefault("reduction_ratio", TRAINED_RATIO)
    return build_pruner("prumerge", **options)


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    vision = model.get_vision_tower().tokens(pixels, pruner.needs, pruner)
    last = vision.layers[max(vision.layers)]
    keys, query = recorded["key_layer23"], recorded["cls_query_layer23"]
    report.close("keys", last["keys"][0], keys[1:], SCORES_ATOL)
    report.close("cls_key", last["cls_key"][0], keys[0], SCORES_ATOL)
    report.close("cls_query", last["cls_query"][0], query, SCORES_ATOL)
    attention = class_attention(last["cls_query"], last["cls_key"], last["keys"])
    report.close("cls_attn", attention[0], recorded["cls_attn"], SCORES_ATOL)
    centers, *_ = pruner.centers(attention)
    report.equal("selected_patch_indices", centers[0], recorded["selected_patch_indices"])
    tokens = pruner.after_encoder(vision).features[0]
    report.close("tokens", tokens, recorded["vision_tokens_before_projector"], 1e-4)
    return True
