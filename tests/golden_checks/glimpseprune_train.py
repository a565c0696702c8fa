"""Training of GlimpsePrune: losses, gradients, and the loss after one step of the optimizer."""

from copy import copy
from dataclasses import fields

import torch

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conv_mode import choose_conv_mode
from llava.front_end import FrontEnd
from llava.pruning import build_pruner
from llava.train.glimpse.batches import BoxCollator, BoxDataset, ModelFacts
from llava.train.glimpse.data import BoxSample
from llava.train.glimpse.loss import GlimpseObjective, LossWeights
from tests.golden_cases import is_qwen, load_arrays, locate
from tests.golden_checks.e2e import image_names
from tests.golden_checks.methods import given
from tests.golden_checks.models import load_checkpoint

LOSS_RTOL = 1e-4
ROWS_ATOL = 2e-4
GRADIENTS_ATOL, GRADIENTS_RTOL = 2e-5, 1e-3
#: float32 noise of the checkpoint of Qwen2.5-VL is larger
QWEN_ATOL = 1e-3


def check_e2e(case, folder, report):
    """One batch of two, from questions and pictures on; LLaVA's recorded values are those without
    the answer in the glimpse's normaliser."""
    recorded = load_arrays(case, folder)
    tokenizer, model, processor = load_checkpoint(case["checkpoint"], folder)
    args, qwen = case["args"], is_qwen(case)
    new_modules = str(locate(args["new_modules"], folder))
    pruner = build_pruner("glimpseprune", new_modules=new_modules)
    model.pruner = pruner
    if qwen:
        processor = copy(processor)
        processor.max_pixels = args["max_pixels"]
    mode = choose_conv_mode(model.config).name
    front = FrontEnd(tokenizer, ModelFacts.of(model), processor, mode)
    samples = [
        BoxSample(question, answer, str(locate(name, folder)), boxes)
        for question, answer, name, boxes in zip(
            case["question"], case["answer"], image_names(case), case["bboxes_xyxy"], strict=True
        )
    ]
    # The recorded masks take boxes as shares of the picture before it is padded.
    dataset = BoxDataset(samples, front, "released")
    items = [dataset[number] for number in range(len(samples))]
    check_items(items, recorded, getattr(model.config, "image_token_id", None), report)
    batch = BoxCollator(front.pad_id)(items)
    weights = given(args, *(field.name for field in fields(LossWeights)))
    objective = GlimpseObjective(model, LossWeights(**weights)).train()
    start = "" if qwen else "causal__"
    with Seen(pruner.module.attn_fuser) as seen:
        out = objective(**batch)
    if qwen:
        report.close("glimpse_attn", seen.rows, recorded["glimpse_attn"], QWEN_ATOL)
        report.close("vip_logits", torch.stack(seen.logits), recorded["vip_logits"], QWEN_ATOL)
    for name in ("le_loss", "dice_loss", "bce_loss", "loc_loss"):
        report.close(name, out[name], recorded[f"{start}{name}"], 0, LOSS_RTOL)
    report.close("total_loss", out["loss"], recorded[f"{start}total_loss"], 0, LOSS_RTOL)
    out["loss"].backward()
    check_gradients(pruner.module, recorded, start, report)
    optimizer = torch.optim.AdamW(pruner.module.parameters(), lr=1e-4, weight_decay=0)
    torch.nn.utils.clip_grad_norm_(pruner.module.parameters(), 1.0)
    optimizer.step()
    after = objective(**batch)["loss"]
    report.close("after a step", after, recorded[f"{start}total_loss_after_step"], 0, LOSS_RTOL)
    model.eval()


class Seen:
    """What the predictor got and gave in a block."""

    def __init__(self, fuser):
        self.fuser, self.rows, self.logits = fuser, None, None

    def __enter__(self):
        self.handle = self.fuser.register_forward_hook(self._keep)
        return self

    def _keep(self, _, inputs, output) -> None:
        self.rows, self.logits = inputs[0], output

    def __exit__(self, *_) -> None:
        self.handle.remove()


def check_items(items, recorded, image_id, report) -> None:
    """Ids, labels and masks of samples; image_id: what stands for every token of an image."""
    for row, item in enumerate(items):
        real = recorded["attention_mask"][row].astype(bool)
        ids = torch.cat([item["prompt"], item["answer"]])
        ignored = torch.full_like(item["prompt"], IGNORE_INDEX)
        labels = torch.cat([ignored, item["labels"]])
        if image_id is not None:
            counts = torch.where(ids == IMAGE_TOKEN_INDEX, item["mask"].numel(), 1)
            ids, labels = ids.repeat_interleave(counts), labels.repeat_interleave(counts)
            ids = ids.masked_fill(ids == IMAGE_TOKEN_INDEX, image_id)
        report.equal("input_ids", ids, recorded["input_ids"][row][real])
        wanted = recorded["labels"][row][real].clip(min=IGNORE_INDEX)
        report.equal("labels", labels, wanted)
    masks = torch.cat([item["mask"].flatten() for item in items])
    report.equal("ref_token_masks", masks, recorded["ref_token_masks"].flatten())


def check_gradients(module, recorded, start, report):
    gradients = {name: p.grad for name, p in module.named_parameters()}
    names = recorded["grad_names"].tolist()
    report.equal("parameters", sorted(gradients), sorted(names))
    for name, norm in zip(names, recorded[f"{start}grad_norms"], strict=True):
        own = gradients[name].double().norm()
        report.close(f"gradient norm of {name}", own, norm, GRADIENTS_ATOL, GRADIENTS_RTOL)
    for key in recorded:
        if key.startswith(f"{start}grad__"):
            name = key.removeprefix(f"{start}grad__")
            own = gradients[name]
            report.close(key, own, recorded[key], GRADIENTS_ATOL, GRADIENTS_RTOL)
    total = sum(g.double().square().sum() for g in gradients.values()).sqrt()
    report.close("gradient norm", total, recorded[f"{start}grad_norm_total"], 0, GRADIENTS_RTOL)


#: cases of Qwen2.5-VL are of a kind of their own
check_qwen = check_e2e
