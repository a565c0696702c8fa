"""CDPruner's recorded cases: text, relevance, order of the picks and their gains."""

import numpy as np
import torch

from llava.pruning import Pruner, VisionTokens, build_pruner
from llava.pruning.cdpruner import RELEVANCE, largest_volume, scale_per_image
from llava.pruning.ops import normalize
from llava.pruning.questions import bare_question
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.methods import NEXT_CROPS, budget, given


def build(case, folder) -> Pruner:
    """The record counts tokens per crop, we count them per image."""
    crops = NEXT_CROPS if (case.get("checkpoint") or "").endswith("v1.6") else 1
    options = given(case["args"], "theta")
    return build_pruner("cdpruner", visual_token_num=budget(case, crops), **options)


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    text = bare_question(case["question"])
    report.equal("text_query", text, case["text_query"])
    segments = pruner.module.segments(text)
    report.equal("clip_text_ids", np.concatenate(segments), recorded["clip_text_ids"])
    text_embeds, _ = pruner.module.run(segments)
    report.close("text_embeds", text_embeds, recorded["text_embeds"], SCORES_ATOL)
    crops = pixels.flatten(0, -4)
    vision = model.get_vision_tower().tokens(crops)
    vision.image_index = torch.zeros(len(crops), dtype=torch.long)
    vision.questions = [case["question"]]
    image_embeds = pruner.module.image_embeds(vision.features)
    report.close("image_embeds", image_embeds, recorded["image_embeds"], SCORES_ATOL)
    vision = pruner.after_encoder(vision)
    relevance = vision.extras[RELEVANCE]
    report.close("relevance", relevance, recorded["relevance"], SCORES_ATOL)
    features = model.get_model().mm_projector(vision.features)
    order = largest_volume(features, relevance, recorded["select_order"].shape[1])
    exact = recorded.get("tile_exact", np.ones(len(order), bool))
    report.equal("select_order", order[exact], recorded["select_order"][exact])
    first = relevance.gather(1, order[:, :1]).square()
    report.close("first gain", first[exact], recorded["step_gain"][exact, :1], SCORES_ATOL)
    return bool(exact.all()) or np.array_equal(order, recorded["select_order"])


def check_select(case, folder, recorded, report):
    features, images, texts = (
        torch.tensor(recorded[name]).float() for name in ("features", "image_embeds", "text_embeds")
    )
    cosine = (normalize(images) @ normalize(texts).T).mean(dim=-1)
    relevance = scale_per_image(-cosine, torch.zeros(len(features), dtype=torch.long))
    if "relevance" in recorded:
        report.close("relevance", relevance, recorded["relevance"], SCORES_ATOL)
    vision = VisionTokens(
        features=features,
        positions=torch.arange(features.shape[1]).expand(len(features), -1),
        grid=(1, features.shape[1]),
        extras={RELEVANCE: relevance},
    )
    order = build(case, folder).select(vision)
    count = case["args"].get("expected_count", order.shape[1])
    report.equal("expected_count", len(order[0].unique()), count)
    if "expected_order" in recorded:
        report.equal("expected_order", order, recorded["expected_order"])
    if "expected_keep" in recorded:
        report.equal("expected_keep", order.sort(dim=1).values, recorded["expected_keep"])
    if "expected_order_prefix" in recorded:
        prefix = recorded["expected_order_prefix"]
        start = order[:, : prefix.shape[1]]
        alike = first_alike(features, relevance)
        theirs = torch.tensor(prefix).long()
        report.equal("expected_order_prefix", alike.gather(1, start), alike.gather(1, theirs))


def first_alike(features, relevance) -> torch.Tensor:
    """(B, N) the first token with the same features and relevance as each: rounding decides which
    of two equal tokens is picked."""
    same = (features[:, :, None] == features[:, None]).all(dim=-1)
    same &= (relevance[:, :, None] - relevance[:, None]).abs() < 1e-6
    return same.to(torch.uint8).argmax(dim=2)


FUNCTIONS = {"select": check_select}
