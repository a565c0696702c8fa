"""Nüwa: whole runs with what stage 1 and stage 2 did, and its parts on recorded inputs."""

import math

import numpy as np
import torch

from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.image_layout import image_layout, spatial_layout
from llava.pruning import VisionTokens, build_pruner
from llava.pruning.nuwa import View, choose, proximity
from tests.golden_cases import load_arrays
from tests.golden_checks import e2e
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.methods import given
from tests.golden_checks.models import load_checkpoint, open_images, prepare

OPTIONS = ("visual_token_num", "distance", "pillar_quantile")


def build(case, folder):
    args = case["args"]
    options = given(args, *OPTIONS)
    if args.get("tower") == "ablation":
        mode = "l2norm" if args.get("l2norm", False) else "none"
        options |= {"region": args.get("region", True), "pillar_mode": mode}
    return build_pruner("nuwa", **options)


def check_e2e(case, folder, report):
    function = case["args"].get("function")
    if function:
        FUNCTIONS[function](case, folder, load_arrays(case, folder), report)
    else:
        if case["args"].get("text_first"):
            template = e2e.conv_templates[case["conv_mode"]].copy()
            template.append_message(template.roles[0], case["question"] + "\n<image>")
            template.append_message(template.roles[1], None)
            case = {**case, "prompt": template.get_prompt()}
        e2e.check_single(case, folder, report)


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    tower = model.get_vision_tower()
    crops = pixels.flatten(0, -4)
    extras = tower.tokens(crops, pruner.needs, pruner)
    if "cls_score" in recorded:
        salience = extras.cls_attention.sum(dim=1)
        report.close("cls_score", salience, recorded["cls_score"], SCORES_ATOL)
    marks = (recorded["input_ids"] == e2e.IMAGE_TOKEN_INDEX).nonzero()[0]
    start, kept = int(marks[0]), trace.visual_positions[0]
    count = len(recorded["visual_embeds"])
    places = trace.position_ids[0, start : start + count] - start
    if "is_newline" in recorded:
        newline = recorded["is_newline"]
        report.equal("is_newline", kept.numpy() == -1, newline)
        report.equal("visual_index", places, recorded["visual_index"])
        report.equal("stage2_span", count, int(recorded["stage2_span"]))
        wide = int(recorded["local_grid"][1]) + 1
        ours = places.numpy()[~newline]
        num_patches = tower.num_patches
        local = ours - num_patches
        local = num_patches + local // wide * (wide - 1) + local % wide
        ours = np.where(ours < num_patches, ours, local)
        report.equal("keep_indices", ours, recorded.pop("keep_indices"))
    else:
        report.equal("kept places", places, recorded["keep_indices"])
    if "decode_position_first" in recorded:
        following = int(trace.position_ids.max()) + 1
        report.equal("decode_position_first", following, int(recorded["decode_position_first"]))
    return True


def build_view(args) -> View:
    """The view of a function case, with the rule for budgets above what the cells offer."""
    cells = args["height"] * args["width"] / 4
    keep, top = args["keep"], args["top_per_region"]
    if keep > top * cells:
        top = min(math.ceil(keep / cells), 4)
        keep = args["height"] * args["width"] if top == 4 else keep
    return View(args["height"], args["width"], keep, top, args["pillar_quantile"])


def check_stage1(case, folder, recorded, report):
    args = case["args"]
    view = build_view(args)
    inputs = (torch.tensor(recorded[k])[None] for k in ("features", "similarity_features", "score"))
    features, similar, score = inputs
    chosen = choose(score, view)
    report.equal("keep_indices", chosen[0], recorded["keep_indices"])
    pruner = build_pruner("nuwa", distance=args["distance"])
    blended, pillar = pruner.collect(features, similar, score, chosen, view)
    report.equal("pillar_mask", pillar[0], recorded["pillar_mask"])
    report.close("aggregated", blended[0], recorded["aggregated"], 1e-4)


def check_kernel(case, folder, recorded, report):
    args = case["args"]
    view = View(args["height"], args["width"], 0, 0, 0)
    every = torch.arange(view.rows * view.columns)[None]
    report.close("kernel", proximity(every, view, args["distance"])[0], recorded["kernel"], 1e-6)


def check_anyres(case, folder, recorded, report):
    """Where kept local patches, overview and newlines stand."""
    args, side, crop = case["args"], 24, 336
    tiles = get_anyres_image_grid_shape(args["image_size"], args["pinpoints"], crop)
    report.equal("tiles_wh", list(tiles), recorded["tiles_wh"].tolist())
    count = 1 + math.prod(tiles)
    layout = image_layout(slice(0, count), tiles, (side, side), args["image_size"])
    vision = VisionTokens(
        features=torch.zeros(count, side * side, 1),
        positions=torch.arange(side * side).expand(count, -1),
        grid=(side, side),
        cls_attention=torch.ones(count, 1, side * side),
        layouts=[layout],
    )
    top, bottom, left, right = layout.window
    report.equal("grid", [bottom - top, right - left], recorded["grid"].tolist())
    local = next(
        places[0]
        for view, places in build_pruner("nuwa", visual_token_num=160).views(vision).items()
        if len(places[0]) == (bottom - top) * (right - left) and int(places[0][0]) >= side * side
    )
    report.equal("stitched_source", local - side * side, recorded["stitched_source"])
    keep = torch.zeros(count * side * side, dtype=torch.bool)
    keep[local[recorded["local_keep"]]] = True
    vision.valid = keep.view(count, -1)
    image = spatial_layout(vision, layout, side * side, torch.zeros(1))
    rank = torch.full((count * side * side,), -1)
    rank[local[recorded["local_keep"]]] = torch.arange(len(recorded["local_keep"]))
    ours = torch.where(image.patches < 0, -1, rank[image.patches])
    report.equal("sequence", ours, recorded["sequence"])
    report.equal("position", image.offsets, recorded["position"])


def check_batch(case, folder, recorded, report):
    """The release shares the budget out among the images of a call."""
    args = case["args"]
    _, model, processor = load_checkpoint(case["checkpoint"], folder)
    images = open_images(args["images"], folder)
    pixels, _ = prepare(images, model, processor)
    pruner = model.pruner = build(case, folder)
    vision = model.get_vision_tower().tokens(pixels, pruner.needs, pruner)
    salience = vision.cls_attention.sum(dim=1)
    report.close("cls_score", salience, recorded["cls_score"], SCORES_ATOL)
    keep = recorded["keep_indices"].shape[1]
    quantile = 0.55 if pruner.pillar_quantile is None else pruner.pillar_quantile
    view = View(*vision.grid, keep, args["visual_token_num"] // 64, quantile)  # as for one image
    pruner.view = lambda *_: view
    kept = pruner.after_encoder(vision)
    report.equal("keep_indices", kept.positions, recorded["keep_indices"])
    report.close("aggregated", kept.features, recorded["aggregated"], 1e-4)
    projected = model.get_model().mm_projector(kept.features)
    report.close("projected", projected, recorded["projected"], 1e-4)


FUNCTIONS = {
    "stage1_aggregate": check_stage1,
    "proximity_kernel": check_kernel,
    "anyres_layout": check_anyres,
    "vision_tower_batch": check_batch,
}
