"""Whole-model cases: prompt to greedy tokens, with what the pruning method kept."""

import re
from copy import copy

import numpy as np
import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.pruning import trace_pruning
from tests.golden_cases import build_from_case, load_arrays
from tests.golden_checks.methods import method_check
from tests.golden_checks.models import load_checkpoint, open_images, prepare

EMBEDS_ATOL = 1e-4
LOGITS_ATOL = 3e-4
#: sums over many values collect rounding errors
SUMS_ATOL, SUMS_RTOL = 2e-3, 1e-5
#: a step whose two best logits are closer than this may pick either
CLEAR_GAP = 2e-3
#: recorded gaps between the two best logits of every step, under their several names
GAP_FIELDS = ("step_margin", "step_gaps", "logit_gap")


def as_recorded(recorded) -> dict:
    """Keywords of `generate`: greedy, as many tokens as were recorded, and the scores of all."""
    return greedy(recorded["output_ids"].shape[-1])


def greedy(most: int, end: int | None = None) -> dict:
    """Keywords of `generate`: greedy, `most` tokens or up to the mark `end`, and their scores."""
    return dict(
        do_sample=False,
        max_new_tokens=most,
        eos_token_id=-1 if end is None else end,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )


def prompt_of(case: dict, question: str) -> str:
    """The question in the template of the case, after one mark per image."""
    template = conv_templates[case["conv_mode"]].copy()
    marks = "<image>\n" * len(image_names(case))
    template.append_message(template.roles[0], marks + question)
    template.append_message(template.roles[1], None)
    return template.get_prompt()


def image_names(case: dict) -> list[str]:
    names = case.get("images") or case.get("image") or []
    return [names] if isinstance(names, str) else list(names)


def config_changes(case: dict) -> dict:
    """Config values a case of the plain model changes; those of other methods are their options."""
    return case["args"] if case.get("method", "none") == "none" else {}


def check_single(case, folder, report, steps: int | None = None):
    """One prompt: pixels, visual embeddings, kept tokens, cache lengths, logits and tokens.

    steps: how many generated tokens to compare; None: all that were recorded
    """
    recorded = load_arrays(case, folder)
    recorded["output_ids"] = recorded["output_ids"][:steps]
    tokenizer, model, processor = load_checkpoint(case["checkpoint"], folder, config_changes(case))
    pruner = model.pruner = build_from_case(case, folder)
    prompt = case.get("prompt") or prompt_of(case, case["question"])
    input_ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    report.equal("input_ids", input_ids[0], recorded["input_ids"])
    pixels, sizes = case_pixels(case, folder, model, processor, recorded)
    check_pixels(pixels, recorded, report)

    # Recorded with the splice of training: a prompt that was cut, an image without a mark.
    cut = "tokenizer_model_max_length" in case["args"]
    model.as_in_training = cut or (pixels is not None and "<image>" not in prompt)
    with trace_pruning(model, embeds=True) as trace:
        output = model.generate(
            input_ids,
            images=pixels,
            image_sizes=sizes,
            **as_recorded(recorded),
            **question_of(case, pixels),
        )
    scores = torch.stack(output.scores, dim=1)[0]
    trace.image_sizes = sizes
    if check_method := method_check(case):
        if not check_method(case, recorded, model, pruner, pixels, trace, report):
            return  # another selection than the recorded one is allowed: nothing after it compares
    if cut:
        embeds = model.build_prompt(input_ids, images=pixels, image_sizes=sizes).inputs_embeds[0]
        report.close("visual_embeds", embeds, recorded["visual_embeds"], EMBEDS_ATOL)
    else:
        check_visual(trace, input_ids, recorded, report)
    check_decoder(trace, recorded, report)
    report.close("first_logits", scores[0], recorded["first_logits"], LOGITS_ATOL)
    check_tokens(output.sequences[0], scores, recorded, report)


def question_of(case: dict, pixels) -> dict:
    """The question for every image, for methods that read it."""
    if pixels is None or isinstance(case["question"], list):
        return {}
    return {"questions": [case["question"]] * len(pixels)}


def case_pixels(case, folder, model, processor, recorded):
    """(pixels, sizes); some cases pass a list, or one padded crop to a checkpoint that tiles."""
    images = open_images(image_names(case), folder)
    if not images:
        return None, None
    as_list = case.get("images_passed_as") == "list"
    one_crop = as_list and len(images) == 1 and recorded["pixel_shapes"].shape[1] == 3
    if one_crop:
        padded = copy(model.config)
        padded.image_aspect_ratio = "pad"
        return list(process_images(images, processor, padded)), [image.size for image in images]
    return prepare(images, model, processor, as_list)


def check_pixels(pixels, recorded, report):
    if "pixel_shapes" not in recorded or pixels is None:
        return
    tensors = pixels if isinstance(pixels, list) else [pixels]
    report.equal(
        "pixel_shapes", [list(t.shape) for t in tensors], recorded["pixel_shapes"].tolist()
    )
    stats = np.stack([sums(t) for t in tensors])
    report.close("pixel_stats", stats, recorded["pixel_stats"], 1e-2, SUMS_RTOL)


def sums(tensor) -> np.ndarray:
    """Sum, sum of magnitudes and sum of squares in double precision."""
    wide = tensor.detach().double()
    return torch.stack([wide.sum(), wide.abs().sum(), wide.square().sum()]).numpy()


def check_visual(trace, input_ids, recorded, report):
    """Embeddings and patch indices of the visual tokens, and where they stand."""
    width = recorded["visual_embeds"].shape[1] if "visual_embeds" in recorded else None
    embeds = torch.cat(trace.visual_embeds) if trace.visual_embeds else torch.zeros(0, width or 1)
    if "n_visual" in recorded:
        report.equal("number of visual tokens", len(embeds), int(recorded["n_visual"]))
    if "visual_embeds" in recorded:
        report.close("visual_embeds", embeds, recorded["visual_embeds"], EMBEDS_ATOL)
    if "visual_rows" in recorded and len(embeds) > recorded["visual_rows"].max():
        rows = embeds[recorded["visual_rows"]]
        report.close("visual_embeds (rows)", rows, recorded["visual_embeds_rows"], EMBEDS_ATOL)
        report.close("visual_row_sums", embeds.sum(1), recorded["visual_row_sums"], SUMS_ATOL)
    if "visual_stats" in recorded:
        report.close("visual_stats", sums(embeds), recorded["visual_stats"], 1e-1, 1e-5)
    if "image_start" in recorded:
        lengths = [len(image) for image in trace.visual_embeds]
        marks = (input_ids[0] == IMAGE_TOKEN_INDEX).nonzero()[:, 0].tolist()
        shift = np.cumsum([0, *lengths])[:-1] - np.arange(len(lengths))
        report.equal("image_len", lengths, recorded["image_len"].tolist())
        report.equal("image_start", (marks + shift).tolist(), recorded["image_start"].tolist())
    if "keep_indices" in recorded and len(trace.visual_positions) == 1:
        report.equal("keep_indices", trace.visual_positions[0], recorded["keep_indices"])
    if "keep_order" in recorded:
        positions, patches = trace.visual_positions[0], recorded["keep_mask"].shape[1]
        order = torch.stack([positions // patches, positions % patches], dim=1)
        report.equal("keep_order (crop, patch)", order, recorded["keep_order"])


def entering(trace, layer: int):
    """(n,) places, in the prompt that entered layer 0, of the tokens that enter `layer`; a layer
    before which nothing was dropped has those of the layer before it."""
    cuts = [cut for cut in trace.decoder_keep if cut <= layer]
    if not cuts:
        return torch.arange(trace.position_ids.shape[1])
    return trace.decoder_keep[max(cuts)][0]


def cut_layer(pruner, model) -> int:
    """The first decoder layer that sees fewer tokens."""
    return pruner.cut_layer(model.config.num_hidden_layers)


def check_decoder(trace, recorded, report):
    """Positions, what entered which layer, and cache lengths."""
    if "seq_len" in recorded:
        report.equal("seq_len", trace.position_ids.shape[1], int(recorded["seq_len"]))
    if "position_ids" in recorded:
        report.equal("position_ids", trace.position_ids[0], recorded["position_ids"].reshape(-1))
    for name in recorded:
        if match := re.fullmatch(r"decoder_keep_L(\d+)", name):  # other weights have a suffix
            report.equal(name, entering(trace, int(match[1])), recorded[name])
    if "kv_len" in recorded:
        report.equal(
            "kv_len", [int(length[0]) for length in trace.kv_lengths], recorded["kv_len"].tolist()
        )


def check_tokens(ours, scores, recorded, report, row=...):
    """Greedy tokens, up to the first step whose choice is not clear."""
    gaps = next((recorded[name][row] for name in GAP_FIELDS if name in recorded), None)
    steps = clear_steps(scores, None if np.ndim(gaps) == 0 else np.asarray(gaps))
    report.equal("output_ids", ours[:steps], recorded["output_ids"][row][:steps])


def clear_steps(scores, gaps=None) -> int:
    """Steps before the first whose two best of `scores` (n, V) are too close to tell apart.

    gaps: those between the two best where they were recorded
    """
    if gaps is None:
        best = scores.topk(2, dim=-1).values
        gaps = (best[:, 0] - best[:, 1]).numpy()
    unclear = np.flatnonzero(gaps < CLEAR_GAP)
    return int(unclear[0]) if len(unclear) else len(scores)


def check_batch(case, folder, report):
    """Two prompts of different lengths: splice, loss, logits, and tokens where recorded."""
    recorded = load_arrays(case, folder)
    tokenizer, model, processor = load_checkpoint(case["checkpoint"], folder, config_changes(case))
    model.pruner = build_from_case(case, folder)
    input_ids, mask = torch.tensor(recorded["input_ids"]), torch.tensor(recorded["attention_mask"])
    for row, prompt in enumerate(case["prompt"]):
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")
        report.equal(f"input_ids of row {row}", ids, recorded["input_ids"][row][mask[row].bool()])
    pixels, sizes = prepare(open_images(case["images"], folder), model, processor)
    labels = torch.tensor(recorded["labels_in"])
    with torch.no_grad():
        _, positions, mask_out, _, embeds, labels_out = model.prepare_inputs_labels_for_multimodal(
            input_ids, torch.zeros_like(input_ids), mask, None, labels, pixels, sizes
        )
        out = model(input_ids, attention_mask=mask, labels=labels, images=pixels, image_sizes=sizes)
    report.equal("position_ids_out", positions, recorded["position_ids_out"])
    report.equal("attention_mask_out", mask_out, recorded["attention_mask_out"])
    report.equal("labels_out", labels_out, recorded["labels_out"])
    report.close("embeds_row_sums", embeds.sum(-1), recorded["embeds_row_sums"], SUMS_ATOL)
    report.close(
        "embeds_row_sq", embeds.square().sum(-1), recorded["embeds_row_sq"], SUMS_ATOL, 1e-4
    )
    logits = out.logits[torch.arange(len(labels)), torch.tensor(recorded["last_valid"])]
    report.close("logits_last_valid", logits, recorded["logits_last_valid"], LOGITS_ATOL)
    report.close("loss", out.loss, recorded["loss"], 1e-4)
    report.true("labels_out supervises nothing", (labels_out != IGNORE_INDEX).any())
    if "output_ids" not in recorded:
        return
    output = model.generate(
        input_ids,
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
    report.close("first_logits", scores[:, 0], recorded["first_logits"], LOGITS_ATOL)
    for row, ids in enumerate(output.sequences):
        report.prefix = f"row {row}: "
        check_tokens(ids, scores[row], recorded, report, row)
    report.prefix = ""
