"""Cases of the plain Qwen2.5-VL: pixels, tower, prompt, decoder and greedy tokens.

"qwen-plain" is the whole model. "qwen-parts" is what a checkpoint cut after its first layers can
still show: every part is given what was recorded in front of it.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import numpy as np
import torch

from llava.front_end import FrontEnd
from llava.model.multimodal_encoder.qwen2_5_vl_encoder import plan_images
from llava.pruning import trace_pruning
from llava.segments import window_order
from tests.conftest import pad_batch
from tests.golden_cases import load_arrays
from tests.golden_checks.e2e import as_recorded, check_tokens
from tests.golden_checks.models import load_checkpoint, open_images

PIXELS_ATOL = 1e-5
EMBEDS_ATOL = 2e-4
LOGITS_ATOL = 1e-3


def check_plain(case, folder, report):
    recorded = load_arrays(case, folder)
    tokenizer, model, processor = load_checkpoint(case["checkpoint"], folder)
    pixels = prepared(case, folder, processor, recorded, report)
    ids, mask = marked_ids(case, tokenizer, model)
    blocks = Watch(model.visual.blocks, numbers_of("vit_block_", recorded))
    layers = Watch(model.model.layers, numbers_of("decoder_out_last_", recorded))
    with torch.no_grad(), trace_pruning(model, embeds=True) as trace, blocks, layers:
        images = model.image_tokens(pixels) if pixels else None
        check_prompt(model, ids, mask, images, recorded, report)
        trace.visual_embeds.clear()
        output = model.generate(
            ids,
            attention_mask=mask,
            images=images,
            **as_recorded(recorded),
        )
    for number, out in blocks.first.items():
        check_block(out, model, pixels, f"vit_block_{number}", recorded, report)
    for number, out in layers.first.items():
        name = f"decoder_out_last_{number}"
        report.close(name, out[0, -1], recorded[name], LOGITS_ATOL)
    if pixels:
        embeds = torch.cat(trace.visual_embeds)
        report.close("visual_embeds", embeds, recorded["visual_embeds"], EMBEDS_ATOL)
    longest = [int(lengths.max()) for lengths in trace.kv_lengths]
    report.equal("kv_len", longest, recorded["kv_len"].tolist())
    scores = torch.stack(output.scores, dim=1)
    logits = recorded["first_logits"].reshape(len(scores), -1)
    report.close("first_logits", scores[:, 0], logits, LOGITS_ATOL)
    tokens = {key: np.atleast_2d(recorded[key]) for key in ("output_ids", "step_gaps")}
    for row, answer in enumerate(output.sequences):
        check_tokens(answer, scores[row], tokens, report, row)


def check_parts(case, folder, report):
    recorded = load_arrays(case, folder)
    tokenizer, model, processor = load_checkpoint(case["checkpoint"], folder)
    pixels = prepared(case, folder, processor, recorded, report)
    ids, mask = marked_ids(case, tokenizer, model)
    blocks, layers = Watch(model.visual.blocks, [7]), Watch(model.model.layers, [0])
    with torch.no_grad(), blocks, layers:
        images = model.image_tokens(pixels)
        features = torch.tensor(recorded["vit_block_31"]).unflatten(0, (-1, 4))
        order = torch.tensor(recorded["window_index"])
        embeds = model.visual.merger(torch.empty_like(features).index_copy_(0, order, features))
        report.close("visual_embeds", embeds, recorded["visual_embeds"], EMBEDS_ATOL)
        parts = torch.tensor(recorded["visual_embeds"]).split([image.length for image in images])
        known = [replace(image, embeds=part) for image, part in zip(images, parts, strict=True)]
        check_prompt(model, ids, mask, known, recorded, report)
        model(ids, attention_mask=mask, images=known)
    check_block(blocks.first[7], model, pixels, "vit_block_7", recorded, report)
    last = layers.first[0][0, -1]
    report.close("decoder_out_last_0", last, recorded["decoder_out_last_0"], LOGITS_ATOL)


def numbers_of(prefix: str, recorded) -> list[int]:
    """Of the layers that are recorded under a name that begins like this."""
    return [int(name.removeprefix(prefix)) for name in recorded if name.startswith(prefix)]


class Watch:
    """Remembers what modules of these numbers gave in their first call inside the block; further
    calls and other modules run as without it."""

    def __init__(self, modules, numbers):
        self.modules, self.numbers, self.first = modules, numbers, {}

    def __enter__(self):
        self.handles = {
            number: self.modules[number].register_forward_hook(
                lambda _, __, out, number=number: self._keep(number, out)
            )
            for number in self.numbers
        }
        return self

    def _keep(self, number, out) -> None:
        self.first[number] = out[0] if isinstance(out, tuple) else out
        self.handles[number].remove()

    def __exit__(self, *_) -> None:
        for handle in self.handles.values():
            handle.remove()


def prepared(case, folder, processor, recorded, report) -> list[torch.Tensor]:
    """The images of a case as the model takes them, compared with the recorded pixels."""
    processor = copy(processor)
    for key in ("min_pixels", "max_pixels"):
        setattr(processor, key, case["args"].get(key, getattr(processor, key)))
    pictures = open_images(case["image"], folder)
    if not pictures:
        return []
    batch = processor.preprocess(pictures)
    pixels = batch["pixel_values"]
    report.equal("image_grid_thw", batch["image_grid_thw"], recorded["image_grid_thw"])
    rows = pixels[recorded["pixel_row_index"]]
    report.close("pixel_rows", rows, recorded["pixel_rows"], PIXELS_ATOL)
    wide = pixels.double()
    report.close("pixel_row_sum", wide.sum(dim=1), recorded["pixel_row_sum"], 1e-3)
    angles = torch.arange(wide.shape[1]).double().cos()
    report.close("pixel_row_cosdot", wide @ angles, recorded["pixel_row_cosdot"], 1e-3)
    check_windows(batch["image_grid_thw"], recorded, report)
    return processor.split(pixels, batch["image_grid_thw"])


def check_windows(grids, recorded, report) -> None:
    orders, sizes, start = [], [], 0
    for _, rows, columns in grids.tolist():
        order, size = window_order(rows // 2, columns // 2, 4)
        orders.append(order + start)
        sizes.append(size)
        start += len(order)
    ends = torch.cat(sizes).cumsum(0) * 4
    report.equal("window_index", torch.cat(orders), recorded["window_index"])
    report.equal("cu_window_seqlens", [0, *ends.tolist()], recorded["cu_window_seqlens"].tolist())


def marked_ids(case, tokenizer, model) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts (B, L) with a mark for every image, padded on the left, and their mask."""
    questions = case["question"] if isinstance(case["question"], list) else [case["question"]]
    images = case["args"].get("batch_images") or [case["image"]]
    front, rows = FrontEnd(tokenizer, model, None, "qwen2_5_vl"), []
    for question, own in zip(questions, images, strict=True):
        talk = front.conversation()
        if case["args"].get("system"):
            talk.system = f"<|im_start|>system\n{case['args']['system']}"
        talk.append_message(talk.roles[0], front.marked(question, len(own)))
        talk.append_message(talk.roles[1], None)
        rows.append(front.encode(talk.get_prompt())[None])
    return pad_batch(rows)


def check_prompt(model, ids, mask, images, recorded, report) -> None:
    """Ids and positions of the prompts, on tokens."""
    prompt = model.build_prompt(ids, mask, None, images, padding_side="left")
    tokens = torch.tensor(recorded["attention_mask"]).bool()
    report.equal("attention_mask", prompt.attention_mask, tokens)
    wanted = torch.tensor(np.atleast_2d(recorded["input_ids"]))
    report.equal("input_ids", prompt.token_ids[tokens], wanted[tokens])
    positions = torch.tensor(recorded["position_ids"]).reshape(3, *tokens.shape).permute(1, 2, 0)
    report.equal("position_ids", prompt.position_ids[tokens], positions[tokens])
    follows = prompt.position_ids.flatten(1).amax(dim=1, keepdim=True) + 1
    report.equal("rope_delta", follows - tokens.shape[1], recorded["rope_delta"])


def check_block(out, model, images, name, recorded, report) -> None:
    """The output of a tower layer, in the recorded order of windows."""
    plan = plan_images([image.shape[:2] for image in images], model.visual.config, "cpu")
    blocks = out.unflatten(0, (-1, 4))
    blocks = torch.empty_like(blocks).index_copy_(0, plan.blocks, blocks)
    ordered = blocks[torch.tensor(recorded["window_index"])].flatten(0, 1)
    report.close(name, ordered, recorded[name], EMBEDS_ATOL)
