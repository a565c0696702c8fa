"""Training of GlimpsePrune: losses, gradients, and the loss after one step of the optimizer."""

from dataclasses import fields

import numpy as np
import torch

from llava.constants import IGNORE_INDEX
from llava.pruning import build_pruner
from llava.pruning.cells import boxes_to_cells
from llava.train.glimpseprune_loss import GlimpseObjective, LossWeights
from tests.golden_cases import load_arrays, locate
from tests.golden_checks.e2e import image_names
from tests.golden_checks.methods import given
from tests.golden_checks.models import load_checkpoint, open_images, prepare

LOSS_RTOL = 1e-4
ROWS_ATOL = 2e-4
GRADIENTS_ATOL, GRADIENTS_RTOL = 2e-5, 1e-3


def check_e2e(case, folder, report):
    """One batch of two; the recorded values without the answer in the glimpse's normaliser."""
    recorded = load_arrays(case, folder)
    _, model, processor = load_checkpoint(case["checkpoint"], folder)
    args = case["args"]
    new_modules = str(locate(args["new_modules"], folder))
    pruner = build_pruner("glimpseprune", new_modules=new_modules)
    model.pruner = pruner
    images = open_images(image_names(case), folder)
    pixels, _ = prepare(images, model, processor)
    boxes = zip(case["bboxes_xyxy"], images, strict=True)
    masks = torch.stack([released_mask(own, image.size) for own, image in boxes])
    report.equal("ref_token_masks", masks, recorded["ref_token_masks"])
    batch = split(recorded) | {"images": pixels, "masks": masks}
    weights = given(args, *(field.name for field in fields(LossWeights)))
    objective = GlimpseObjective(model, LossWeights(**weights)).train()
    out = objective(**batch)
    for name in ("le_loss", "dice_loss", "bce_loss", "loc_loss"):
        report.close(name, out[name], recorded[f"causal__{name}"], 0, LOSS_RTOL)
    report.close("total_loss", out["loss"], recorded["causal__total_loss"], 0, LOSS_RTOL)
    out["loss"].backward()
    check_gradients(pruner.module, recorded, report)
    optimizer = torch.optim.AdamW(pruner.module.parameters(), lr=1e-4, weight_decay=0)
    torch.nn.utils.clip_grad_norm_(pruner.module.parameters(), 1.0)
    optimizer.step()
    after = objective(**batch)["loss"]
    report.close("after a step", after, recorded["causal__total_loss_after_step"], 0, LOSS_RTOL)
    model.eval()


def released_mask(boxes, size):
    """The recorded masks take boxes as shares of the picture before it is padded."""
    width, height = size
    shares = np.array(boxes) / np.array([width, height, width, height])
    return boxes_to_cells(shares.tolist(), (24, 24))


def split(recorded) -> dict:
    """The recorded rows cut in front of the first supervised token."""
    rows = []
    for row in range(len(recorded["input_ids"])):
        real = recorded["attention_mask"][row].astype(bool)
        ids = torch.tensor(recorded["input_ids"][row][real])
        labels = torch.tensor(recorded["labels"][row][real])
        first = int((labels >= 0).nonzero()[0])
        rows.append((ids[:first], ids[first:], labels[first:].clamp(min=IGNORE_INDEX)))
    prompts, answers, labels = zip(*rows, strict=True)
    input_ids = left_padded(prompts, 0)
    answer_ids = right_padded(answers, 0)
    labels = right_padded(labels, IGNORE_INDEX)
    return {
        "input_ids": input_ids,
        "attention_mask": left_padded([torch.ones_like(row) for row in prompts], 0),
        "answer_ids": answer_ids,
        "answer_mask": right_padded([torch.ones_like(row) for row in answers], 0),
        "labels": labels,
    }


def right_padded(rows, value):
    return torch.nn.utils.rnn.pad_sequence(rows, True, value)


def left_padded(rows, value):
    return right_padded([row.flip(0) for row in rows], value).flip(1)


def check_gradients(module, recorded, report):
    gradients = {name: p.grad for name, p in module.named_parameters()}
    names = recorded["grad_names"].tolist()
    report.equal("parameters", sorted(gradients), sorted(names))
    for name, norm in zip(names, recorded["causal__grad_norms"], strict=True):
        own = gradients[name].double().norm()
        report.close(f"gradient norm of {name}", own, norm, GRADIENTS_ATOL, GRADIENTS_RTOL)
    for key in recorded:
        if key.startswith("causal__grad__"):
            name = key.removeprefix("causal__grad__")
            own = gradients[name]
            report.close(key, own, recorded[key], GRADIENTS_ATOL, GRADIENTS_RTOL)
    total = sum(g.double().square().sum() for g in gradients.values()).sqrt()
    report.close("gradient norm", total, recorded["causal__grad_norm_total"], 0, GRADIENTS_RTOL)
