"""GlimpsePrune: the glimpse's attention, importance logits, masks, batches, and what is oracle."""

import json
from copy import copy

import numpy as np
import torch

from llava.model.language_model.qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from llava.pruning import Prefill, build_pruner, trace_pruning
from llava.pruning.glimpseprune import CONDITIONS, WEIGHTS_FILES, GlimpseState
from llava.pruning.glimpseprune_views import CROPS
from llava.pruning.learned import read_part
from llava.pruning.tokens import GRID
from tests.golden_cases import build_from_case, load_arrays, locate
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.e2e import (
    LOGITS_ATOL,
    as_recorded,
    check_single,
    check_tokens,
    entering,
    image_names,
    question_of,
)
from tests.golden_checks.methods import given
from tests.golden_checks.models import load_checkpoint, open_images, prepare
from tests.golden_checks.qwen2_5_vl import EMBEDS_ATOL, marked_ids
from tests.golden_checks.qwen2_5_vl import LOGITS_ATOL as QWEN_ATOL

OPTIONS = (
    "visual_token_num",
    "max_remain_ratio",
    "reduce_threshold",
    "min_remain_num",
    "anchor_positions",
)
NO_LIMIT = {"max_remain_ratio": 1.0, "min_remain_num": 0, "anchor_positions": ()}
IMPORTANCE_ATOL = 2e-4


def build(case, folder):
    args = case["args"]
    options = given(args, *OPTIONS)
    options["new_modules"] = str(locate(args["new_modules"], folder))
    # "None" is no limit in the record; with us it is what the trained part says.
    options |= {name: value for name, value in NO_LIMIT.items() if args.get(name, 0) is None}
    if args.get("use_ref_masks"):
        options["ref_boxes"] = args["normed_bboxes"]
    elif args.get("use_zero_masks"):
        options["ref_boxes"] = []
    return build_pruner("glimpseprune", **options)


class Spy:
    """Keeps what the predictor got and gave, layer by layer."""

    def __init__(self, pruner):
        self.fuser = pruner.module.attn_fuser
        self.rows = self.logits = None
        self.hidden = []

    def __enter__(self):
        self.handles = [
            self.fuser.register_forward_hook(self.seen),
            *(layer.register_forward_hook(self.layer) for layer in self.fuser.layers),
        ]
        return self

    def seen(self, _, inputs, output):
        self.rows, self.logits = inputs[0], output[-1]

    def layer(self, _, inputs, output):
        self.hidden.append(output)

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    layer = pruner.last_dense_layer(model.config.num_hidden_layers) + 1
    kept = entering(trace, layer)
    report.equal("position_ids", trace.position_ids[0][kept], recorded.pop("position_ids"))
    start = int((trace.visual_tokens[0] * 0 + list(recorded["input_ids"]).index(-200))[0])
    patches = kept[(kept >= start) & (kept < start + len(recorded["keep_mask"]))] - start
    report.equal("keep_indices", patches, recorded.pop("keep_indices"))
    report.equal(
        "keep_mask", np.isin(np.arange(len(recorded["keep_mask"])), patches), recorded["keep_mask"]
    )
    if "vip_logits" in recorded:
        check_importance(case, recorded, model, pruner, pixels, trace, report)
    return True


def check_importance(case, recorded, model, pruner, pixels, trace, report):
    chance = 1 / (1 + np.exp(-recorded["vip_logits"]))
    report.close("importance in the trace", trace.importance[0], chance, IMPORTANCE_ATOL)
    ids = torch.tensor(recorded["input_ids"])[None]
    with torch.no_grad(), Spy(pruner) as spy:
        model(ids, images=pixels, **question_of(case, pixels))
    report.close("glimpse_attn", spy.rows, recorded["glimpse_attn"], IMPORTANCE_ATOL)
    report.close("vip_logits", spy.logits, recorded["vip_logits"], IMPORTANCE_ATOL)
    for number, hidden in enumerate(spy.hidden):
        if f"vip_hidden_{number}" in recorded:
            wanted = recorded[f"vip_hidden_{number}"]
            report.close(f"vip_hidden_{number}", hidden, wanted, IMPORTANCE_ATOL)
    if "glimpse_vectors" in recorded:
        vectors = torch.stack(list(pruner.module.vectors().values()))
        report.close("glimpse_vectors", vectors, recorded["glimpse_vectors"], SCORES_ATOL)
    if "vip_cond" in recorded:
        tower = model.get_vision_tower()
        extras = tower.tokens(pixels, pruner.needs, pruner).layers
        for number, state in enumerate(pruner.module.config.selected_visual_layers):
            ours = extras[state - 1]["output"][0]
            report.close(f"vip_cond {number}", ours, recorded["vip_cond"][number], SCORES_ATOL)


def check_e2e(case, folder, report):
    """A single prompt, or a batch where several were recorded."""
    if isinstance(case["question"], list):
        check_rows(case, folder, report)
    else:
        check_single(case, folder, report)


def check_rows(case, folder, report):
    """Rows of a batch that keep different numbers of tokens."""
    recorded = load_arrays(case, folder)
    tokenizer, model, processor = load_checkpoint(case["checkpoint"], folder)
    model.pruner = pruner = build_from_case(case, folder)
    pixels, sizes = prepare(open_images(image_names(case), folder), model, processor)
    ids, mask = (torch.tensor(recorded[key]) for key in ("input_ids", "attention_mask"))
    with trace_pruning(model) as trace:
        output = model.generate(
            ids,
            attention_mask=mask,
            images=pixels,
            image_sizes=sizes,
            do_sample=False,
            max_new_tokens=recorded["output_ids"].shape[1],
            eos_token_id=-1,
            output_scores=True,
            return_dict_in_generate=True,
        )
    scores = torch.stack(output.scores, dim=1)
    layer = pruner.last_dense_layer(model.config.num_hidden_layers) + 1
    report.close("first_logits", scores[:, 0], recorded["first_logits"], LOGITS_ATOL)
    padded = trace.position_ids.shape[1] - mask.sum(dim=1) - len(recorded["keep_mask"][0]) + 1
    lengths = recorded["attention_mask_kept"].sum(axis=1)
    for row in range(len(ids)):
        report.prefix = f"row {row}: "
        chance = 1 / (1 + np.exp(-recorded["vip_logits"][row]))
        report.close("importance", trace.importance[row], chance, IMPORTANCE_ATOL)
        kept = trace.decoder_keep[layer][row]  # rows keep different numbers
        start = int(padded[row]) + list(ids[row][mask[row].bool()]).index(-200)
        visual = (kept >= start) & (kept < start + len(recorded["keep_mask"][row]))
        places = np.flatnonzero(recorded["keep_mask"][row])
        report.equal("keep_mask", kept[visual] - start, places)
        own = recorded["position_ids"][row][recorded["attention_mask_kept"][row].astype(bool)]
        report.equal("position_ids", trace.position_ids[row][kept], own)
        report.equal("length", trace.kv_lengths[layer][row], lengths[row])
        check_tokens(output.sequences[row], scores[row], recorded, report, row)
    report.prefix = ""
    longest = [int(n.max()) for n in trace.kv_lengths]
    report.equal("kv_len", longest, recorded["kv_len"].tolist())


# --- Qwen2.5-VL -----------------------------------------------------------------------------------


def check_qwen(case, folder, report):
    """One prompt, or a batch, on images with grids of their own."""
    recorded = load_arrays(case, folder)
    tokenizer, model, processor = load_checkpoint(case["checkpoint"], folder)
    model.pruner = pruner = build(case, folder)
    batch = isinstance(case["question"], list)
    names = case["image"] if batch else [case["image"]]
    ids, mask = marked_ids({**case, "args": {"batch_images": names}}, tokenizer, model)
    images = qwen_images(case, folder, processor, sum(names, []))
    options = dict(
        attention_mask=mask,
        images=images,
        **as_recorded(recorded),
    )
    with trace_pruning(model, embeds=True) as trace, Spy(pruner) as spy:
        output = model.generate(ids, **options)
    prompt = model.build_prompt(ids, mask, images=images, padding_side="left")
    tokens = torch.tensor(np.atleast_2d(recorded.get("attention_mask", np.ones(ids.shape[1]))))
    tokens = tokens.bool() if batch else prompt.attention_mask
    wanted = torch.tensor(np.atleast_2d(recorded["input_ids"]))
    report.equal("input_ids", prompt.token_ids[tokens], wanted[tokens])
    grids = [[1, 2 * h, 2 * w] for h, w in trace.grids]
    report.equal("image_grid_thw", grids, recorded["image_grid_thw"].tolist())
    layer = pruner.last_dense_layer(model.config.num_hidden_layers) + 1
    owner, kept = prompt.visual_index >= 0, torch.zeros_like(prompt.attention_mask)
    for row, places in enumerate(trace.decoder_keep[layer]):
        kept[row, places] = True
    report.equal("keep_mask", kept[owner], recorded["keep_mask"])
    check_positions(prompt, kept, recorded, report)
    if not batch:
        report.equal("keep_indices", kept[owner].nonzero()[:, 0], recorded["keep_indices"])
        name = f"decoder_keep_L{layer}"
        report.equal(name, trace.decoder_keep[layer][0], recorded[name])
        embeds = torch.cat(trace.visual_embeds)
        report.close("visual_embeds", embeds, recorded["visual_embeds"], EMBEDS_ATOL)
        with torch.no_grad():
            plain = model.generate(ids, **options | {"max_new_tokens": 1, "do_selection": False})
        logits = plain.scores[0][0]
        report.close("first_logits_noprune", logits, recorded["first_logits_noprune"], QWEN_ATOL)
    longest = [int(n.max()) for n in trace.kv_lengths]
    report.equal("kv_len", longest, recorded["kv_len"].tolist())
    scores = torch.stack(output.scores, dim=1)
    report.close("first_logits", scores[:, 0], np.atleast_2d(recorded["first_logits"]), QWEN_ATOL)
    keys = ("output_ids", "step_gaps")
    answers = {key: np.atleast_2d(recorded[key]) for key in keys if key in recorded}
    for row, answer in enumerate(output.sequences):
        check_tokens(answer, scores[row], answers, report, row)
    if "vip_logits" in recorded:
        chance = 1 / (1 + np.exp(-recorded["vip_logits"]))
        importance = torch.cat(trace.importance)
        report.close("importance in the trace", importance, chance, IMPORTANCE_ATOL)
        check_predictor(spy, pruner, recorded, report)
    if "vip_cond" in recorded:
        check_conditions(model, images, pruner, recorded, report)


def qwen_images(case, folder, processor, names):
    processor = copy(processor)
    processor.max_pixels = case["args"].get("max_pixels", processor.max_pixels)
    return processor.process_images(open_images(names, folder))


def check_positions(prompt, kept, recorded, report):
    """Positions of what stayed, on tokens."""
    wanted = torch.tensor(recorded["position_ids"]).movedim(0, -1)
    if wanted.ndim == 3:
        wanted = wanted[torch.tensor(recorded["attention_mask_kept"]).bool()]
    report.equal("position_ids", prompt.position_ids[kept], wanted)


def check_predictor(spy, pruner, recorded, report):
    """What it got and gave, layer by layer; hidden states are recorded window by window."""
    report.close("glimpse_attn", spy.rows, recorded["glimpse_attn"], QWEN_ATOL)
    report.close("vip_logits", spy.logits, recorded["vip_logits"], QWEN_ATOL)
    for number, hidden in enumerate(spy.hidden):
        if (name := f"vip_hidden_{number}") in recorded:
            report.close(name, hidden[recorded["window_index"]], recorded[name], QWEN_ATOL)
    if "glimpse_vectors" in recorded:
        vectors = torch.stack(list(pruner.module.vectors().values()))
        report.close("glimpse_vectors", vectors, recorded["glimpse_vectors"], SCORES_ATOL)


def check_conditions(model, images, pruner, recorded, report):
    """The hidden states of the tower that the predictor is given, row by row."""
    layers = pruner.module.config.tower_layers
    wanted = dict.fromkeys(layers, frozenset({"output"}))
    (group,) = model.visual.features(images, wanted)
    for number, layer in enumerate(layers):
        output = group.cues[layer]["output"][0].unflatten(-1, (4, -1)).mean(dim=1)
        report.close(f"vip_cond {number}", output, recorded["vip_cond"][number], EMBEDS_ATOL)


def check_around_predictor(case, folder, recorded, report):
    """What stays, from recorded attention of the glimpse and recorded states of the tower; no
    weights of the model are there."""
    values = json.loads((locate(case["args"]["new_modules"], folder) / "config.json").read_text())
    values["rope_scaling"]["type"] = "mrope"
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**values))
    pruner = build(case, folder)
    pruner.module = pruner.load(model).to_empty(device="cpu")
    _, tensors = read_part(pruner.new_modules, WEIGHTS_FILES)
    pruner.module.load_state_dict(tensors)
    config = pruner.module.config
    is_image = torch.tensor(recorded["input_ids"] == values["image_token_id"])
    rows = torch.zeros(len(is_image), recorded["glimpse_attn"].shape[1])
    rows[is_image] = torch.tensor(recorded["glimpse_attn"])
    states = torch.tensor(recorded["vip_cond"])[:, None]
    conditions = pruner.module.attn_fuser.conditions(list(states))
    context = conditions.new_zeros(1, len(is_image), conditions.shape[-1])
    context[0, is_image] = conditions[0]
    places = torch.arange(len(is_image))[None]
    _, h, w = recorded["image_grid_thw"][0].tolist()
    prefill = Prefill(
        decoder=None,
        layer=config.reduce_layer + 1,
        hidden_states=torch.zeros(1, len(is_image), 1),
        position_ids=places,
        visual_index=is_image.long()[None] - 1,
        patch_index=torch.where(is_image, is_image.cumsum(0), 0)[None] - 1,
        index=places,
        valid=None,
        extras={CONDITIONS: context},
        image_extras=dict(zip((*GRID, CROPS), ([[h // 2]], [[w // 2]], [[1]]), strict=True)),
    )
    parts = rows.T.unflatten(0, (len(config.selected_layers), 1, -1))
    prefill.state = GlimpseState({}, dict(zip(config.selected_layers, parts, strict=True)))
    with Spy(pruner) as spy:
        left = pruner.reduce(prefill)
    check_predictor(spy, pruner, recorded, report)
    name = f"decoder_keep_L{prefill.layer}"
    report.equal(name, left.index[0], recorded[name])
    report.equal("keep_mask", (left.visual_index >= 0).sum(), recorded["keep_mask"].sum())


FUNCTIONS = {"predictor": check_around_predictor}
