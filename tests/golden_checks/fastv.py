"""FastV: the recorded names of its options, its attention row, and the versions that re-select."""

import numpy as np
import torch

from llava.pruning import Prefill, build_pruner
from tests.golden_checks.e2e import check_single, cut_layer, entering
from tests.golden_checks.methods import NEXT_CROPS, PATCHES, given


def build(case, folder):
    options = given(case["args"], prune_layer_K="layer")
    if case["args"].get("visual_token_num") is None:
        return build_pruner("fastv", ratio=case["args"]["R"], **options)
    crops = NEXT_CROPS if case["checkpoint"].endswith("v1.6") else 1
    tokens = min(case["args"]["visual_token_num"], PATCHES * crops)
    return build_pruner("fastv", visual_token_num=tokens, **options)


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    """What was kept, as places among the visual tokens."""
    kept = entering(trace, cut_layer(pruner, model)) - int(recorded["image_pos"])
    visual = kept[(kept >= 0) & (kept < len(trace.visual_embeds[0]))]
    report.equal("keep_indices_visual", visual, np.sort(recorded["keep_indices_visual"]))
    return True


def check_first_step(case, folder, report):
    """These versions choose anew for every token; their prefill is that of the target."""
    check_single(case, folder, report, steps=1)


check_e2e_mask = check_e2e_inplace = check_first_step


def check_select(case, folder, recorded, report):
    args = case["args"]
    rows = torch.tensor(recorded["attn_lastrow_heads"])[None, :, None]
    size = rows.shape[-1]
    start, stop = args["start"], args["start"] + args["n_visual"]
    places = torch.arange(size)[None]
    visual = (places >= start) & (places < stop)
    prefill = Prefill(
        decoder=None,
        layer=2,
        hidden_states=torch.zeros(1, size, 1),
        position_ids=places,
        visual_index=visual.long() - 1,
        patch_index=torch.where(visual, places - start, -1),
        index=places,
        valid=None,
        attention=rows,
    )
    pruner = build_pruner("fastv", visual_token_num=args["visual_token_num"], layer=2)
    score = pruner.score(prefill)
    order = score[0, start:stop].argsort(descending=True, stable=True)
    report.equal("selection_order", order[: args["visual_token_num"]], recorded["selection_order"])
    kept = prefill.keep_visual(score, pruner.visual_token_num)
    report.equal("decoder_keep", kept.index[0], recorded["decoder_keep"])


FUNCTIONS = {"select": check_select}
