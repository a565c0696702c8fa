"""VScan: the picks of its vision stage, and LLaVA-NeXT cases that end there."""

import numpy as np
import torch

from llava.pruning import build_pruner, trace_pruning
from tests.golden_cases import load_arrays
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.e2e import case_pixels
from tests.golden_checks.methods import given
from tests.golden_checks.models import load_checkpoint

EMBEDS_ATOL = 1e-4


def build(case, folder):
    options = given(
        case["args"],
        "layer_list",
        "image_token_list",
        "window",
        visual_token_num="encoder_token_num",
    )
    return build_pruner("vscan", **options)


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    """Attention of both tower layers, local picks and kept patches of every crop."""
    crops = pixels.flatten(0, -4) if isinstance(pixels, torch.Tensor) else torch.cat(pixels)
    vision = model.get_vision_tower().tokens(crops, pruner.needs, pruner)
    shallow = vision.layers[5]["salience"]
    report.close("cls_attn_layer5", shallow, recorded["cls_attn_layer5"], SCORES_ATOL)
    deep = vision.salience
    report.close("cls_attn_layer22", deep, recorded["cls_attn_layer22"], SCORES_ATOL)
    wanted = case["args"]["visual_token_num"]
    kept = pruner.select(vision, wanted)
    report.equal("keep_indices", kept, recorded["keep_indices"])
    local = torch.stack([row.nonzero()[:, 0] for row in pruner.local_picks(vision, wanted)])
    report.equal("local_indices", local, np.sort(recorded["local_indices"], axis=1))
    if recorded["keep_indices"].shape[0] == 1:
        recorded["keep_indices"] = recorded["keep_indices"][0]
    return True


def check_vision(case, folder, report):
    """The vision stage alone: image tokens and newlines as they enter the decoder."""
    recorded = load_arrays(case, folder)
    _, model, processor = load_checkpoint(case["checkpoint"], folder)
    pruner = model.pruner = build(case, folder)
    pixels, sizes = case_pixels(case, folder, model, processor, recorded)
    ids = torch.tensor(recorded["input_ids"])[None]
    with trace_pruning(model, embeds=True) as trace:
        model.build_prompt(ids, images=pixels, image_sizes=sizes)
    check(case, recorded, model, pruner, pixels, trace, report)
    report.close("visual_embeds", trace.visual_embeds[0], recorded["visual_embeds"], EMBEDS_ATOL)
