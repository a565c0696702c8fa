"""MustDrop: merged windows, protected tokens, and where answers stand."""

import numpy as np
import torch

from llava.pruning import build_pruner
from llava.pruning.mustdrop import KEY
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.methods import given

OPTIONS = ("global_thr", "individual_thr", "spatial_threshold", "key_ratio", "pruning_layers")


def build(case, folder):
    options = given(case["args"], *OPTIONS)
    window = case["args"].get("window", 3)
    window = window if isinstance(window, int) else window[0]
    return build_pruner("mustdrop", window=window, **options)


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    source = recorded["visual_token_source"]
    single = source[:, 1] < 0
    patches = np.where(single, source[:, 0], -1)
    report.equal("patches of the visual tokens", trace.visual_positions[0], patches)
    crops = pixels.flatten(0, -4)
    owner = torch.zeros(len(crops), dtype=torch.long)
    tower = model.get_vision_tower()
    vision = tower.tokens(crops, pruner.needs, pruner, image_index=owner)
    vision.image_index = owner
    report.equal("merged windows", (~single).sum(), len(crops) * recorded["num_merged_windows"])
    attention = vision.layers[tower.depth[0] - 1]["salience"]
    report.close("cls_attn_last", attention, recorded["cls_attn_last"], SCORES_ATOL)
    keys = pruner.after_encoder(vision).extras[KEY].flatten().nonzero()[:, 0]
    report.equal("key_set", keys, np.sort(recorded["key_set"].reshape(-1)))
    average = np.mean([int(n) for n in trace.visual_tokens])
    if "avg_visual_tokens" in case["args"]:
        report.close("average", average, case["args"]["avg_visual_tokens"], 1e-2)
    return True
