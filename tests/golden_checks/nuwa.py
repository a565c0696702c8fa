"""Nüwa: whole runs with what stage 1 and stage 2 did, and its parts on recorded inputs."""

import math

import numpy as np
import torch

from llava.front_end import FrontEnd
from llava.mm_utils import get_anyres_image_grid_shape
from llava.model.image_layout import image_layout, spatial_layout
from llava.pruning import VisionTokens, build_pruner, trace_pruning
from llava.pruning.nuwa import View, choose, proximity
from tests.golden_cases import load_arrays
from tests.golden_checks import e2e
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.methods import given
from tests.golden_checks.models import load_checkpoint, open_images, prepare

OPTIONS = ("visual_token_num", "distance", "pillar_quantile")
#: of logits behind 28 layers
LOGITS_ATOL = 1e-3


def build(case, folder):
    args = case["args"]
    if "keep_ratio" in args:
        return build_pruner("nuwa", visual_token_ratio=args["keep_ratio"])
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
        salience = extras.salience * extras.num_heads
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


def check_qwen(case, folder, report):
    """Qwen2.5-VL: what stage 1 was given, did and left, and what stage 2 kept of that."""
    recorded = load_arrays(case, folder)
    tokenizer, model, processor = load_checkpoint(case["checkpoint"], folder)
    pictures = processor.preprocess(open_images([case["image"]], folder))
    report.equal("image_grid_thw", pictures["image_grid_thw"], recorded["image_grid_thw"])
    images = processor.split(pictures["pixel_values"], pictures["image_grid_thw"])
    front = FrontEnd(tokenizer, model, processor, "qwen2_5_vl")
    ids = front.encode(front.prompt(case["question"], 1))[None]
    dense = model.build_prompt(ids, images=model.image_tokens(images))
    report.equal("input_ids", dense.token_ids[0], recorded["input_ids"])
    pruner, stage1, stage2 = build(case, folder), [], []
    pruner.collect = remembering(pruner.collect, stage1)
    pruner.score = remembering(pruner.score, stage2)
    model.pruner = pruner
    with trace_pruning(model, embeds=True) as trace:
        output = model.generate(
            ids,
            images=images,
            **e2e.as_recorded(recorded),
        )
    ((features, similar, salience, chosen, view, _), (_, pillar)) = stage1[0]
    patches = 4 * view.rows * view.columns
    report.close("score", salience[0] * patches, recorded["score"], 1e-4, 1e-4)
    report.close("merged_features", features[0], recorded["merged_features"], 2e-4)
    report.close("similarity_features", similar[0], recorded["similarity_features"], 2e-4)
    report.equal("keep_indices", chosen[0], recorded["keep_indices"])
    report.equal("pillar_mask", pillar[0], recorded["pillar_mask"])
    (kept,), (embeds,) = trace.visual_positions, trace.visual_embeds
    report.equal("kept places", kept, recorded["keep_indices"])
    report.close("visual_embeds", embeds, recorded["visual_embeds"], 2e-4)
    report.equal("position_ids", trace.position_ids[0].T, recorded["position_ids"])
    following = int(trace.position_ids.max()) + 1
    report.equal("decode_position_first", following, int(recorded["decode_position_first"]))
    ((prefill,), scores) = stage2[0]
    report.close("stage2_score", scores[prefill.is_visual], recorded["stage2_score"], 5e-5)
    report.equal("decoder_keep_L15", e2e.entering(trace, 15), recorded["decoder_keep_L15"])
    lengths = [int(length) for length in trace.kv_lengths]
    report.equal("kv_len", lengths, recorded["kv_len"].tolist())
    scores = torch.stack(output.scores, dim=1)[0]
    report.close("first_logits", scores[0], recorded["first_logits"], LOGITS_ATOL)
    e2e.check_tokens(output.sequences[0], scores, recorded, report)


def remembering(function, calls: list):
    """`function`, of which every call leaves its arguments and its result."""

    def call(*args):
        calls.append((args, result := function(*args)))
        return result

    return call


def check_blocks(case, folder, recorded, report):
    """Stage 1 of Qwen2.5-VL on recorded tokens."""
    pruner = build(case, folder)
    rows, columns = (int(side) // 2 for side in recorded["image_grid_thw"][0, 1:])
    view = pruner.with_budget_of(rows * columns).block_view(rows, columns)
    names = ("merged_features", "similarity_features", "score")
    features, similar, score = (torch.tensor(recorded[name])[None] for name in names)
    chosen = choose(score, view)
    report.equal("keep_indices", chosen[0], recorded["keep_indices"])
    blended, pillar = pruner.collect(features, similar, score, chosen, view)
    report.equal("pillar_mask", pillar[0], recorded["pillar_mask"])
    report.close("visual_embeds", blended[0], recorded["visual_embeds"], 1e-4)


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
    salience = vision.salience * vision.num_heads
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
    "stage1_blocks": check_blocks,
    "proximity_kernel": check_kernel,
    "anyres_layout": check_anyres,
    "vision_tower_batch": check_batch,
}
