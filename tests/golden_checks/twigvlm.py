"""TwigVLM: both strategies step by step, and the training of a twig.

Cases record a base model changed by exact factors (`base_transform`), which is undone afterwards.
"""

import json
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from llava.mm_utils import tokenizer_image_token
from llava.pruning import build_pruner, trace_pruning
from llava.pruning.twigvlm import published_name
from llava.train.data import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.train.train_twigvlm import TwigTraining
from tests.golden_cases import load_arrays, locate
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.e2e import (
    CLEAR_GAP,
    EMBEDS_ATOL,
    LOGITS_ATOL,
    clear_steps,
    greedy,
    image_names,
    prompt_of,
)
from tests.golden_checks.methods import NEXT_CROPS, PATCHES, given
from tests.golden_checks.models import load_checkpoint, open_images, prepare

OPTIONS = {"finalwipe_layer": "final_wipe_layer"}
SAME = ("twig_K", "twig_T", "enable_pruning", "num_speculations", "draft_stop_prob")
HALF_ATOL = 2e-2
LOSS_ATOL, NORMS_RTOL = 2e-5, 1e-3


def build(case, folder):
    args = case["args"]
    options = given(args, *SAME, **OPTIONS)
    if (rank := args.get("attention_rank")) is not None:
        crops = NEXT_CROPS if case["checkpoint"].endswith("v1.6") else 1
        rank = int(rank) if rank == int(rank) else rank
        # More than all tokens: pruning is off, as it is with all of them.
        options["visual_token_num"] = min(rank, PATCHES * crops)
    return build_pruner("twigvlm", twig=str(locate(args["twig"], folder)), **options)


def check_e2e(case, folder, report):
    if case["args"].get("mode") == "train":
        check_training(case, folder, report)
    else:
        check_inference(case, folder, report)


@contextmanager
def transformed(model, rules):
    """`model` with the factors of a case on its weights; powers of two, so undone exactly."""
    factors = {}
    for rule in rules:
        prefixes = [""]
        if "layers" in rule:
            first, last = rule["layers"]
            prefixes = [f"model.layers.{layer}." for layer in range(first, last + 1)]
        names = [prefix + name for prefix in prefixes for name in rule["params"]]
        factors |= dict.fromkeys(names, rule["factor"])
    weights = dict(model.named_parameters())
    for name, factor in factors.items():
        weights[name].data *= factor
    try:
        yield
    finally:
        for name, factor in factors.items():
            weights[name].data /= factor


# Inference.


def check_inference(case, folder, report):
    recorded, args = load_arrays(case, folder), case["args"]
    changes = {"mm_patch_merge_type": "flat"} if args.get("layout") == "flat" else None
    tokenizer, model, processor = load_checkpoint(case["checkpoint"], folder, changes)
    pruner = model.pruner = build(case, folder)
    prompt = prompt_of(case, case["question"])
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    report.equal("input_ids", ids[0], recorded["input_ids"])
    pixels, sizes = prepare(open_images(image_names(case), folder), model, processor)
    images = {"images": pixels, "image_sizes": sizes}
    if args.get("layout") == "spatial_unpad":
        feed_recorded(pruner, recorded, report)
    with transformed(model, args.get("base_transform") or []):
        for strategy in ("autoregressive", "self_speculative"):
            report.prefix = f"{strategy}: "
            run_and_compare(model, pruner, ids, images, strategy, case, recorded, report)
    report.prefix = ""


def feed_recorded(pruner, recorded, report):
    """These cases were recorded on visual embeddings made in half precision: those go in."""
    embeds = torch.tensor(recorded["visual_embeds"])

    def before_prompt(image):
        report.close("visual_embeds", image.embeds, embeds, HALF_ATOL)
        return replace(image, embeds=embeds)

    pruner.before_prompt = before_prompt


def run_and_compare(model, pruner, ids, images, strategy, case, recorded, report):
    args, scores, drafts = case["args"], watched_scores(pruner), []
    pruner.module.head.register_forward_hook(lambda _, inputs, logits: drafts.append(logits))
    end = args.get("eos_token_id")
    with trace_pruning(model, embeds=True) as trace:
        output = model.generate(
            ids,
            **images,
            **greedy(args["max_new_tokens"], end),
            generation_strategy=strategy,
        )
    answer = [token for token in output.sequences[0].tolist() if token != end]
    logits = torch.cat(output.scores)
    margin = np.min(recorded.get("margin_target_top2", 1))
    clear = bool(margin >= CLEAR_GAP)  # otherwise rounding decides somewhere
    steps = None if clear else clear_steps(logits)
    report.equal("output_ids", answer[:steps], recorded["output_ids"].tolist()[:steps])
    report.close("first_logits", logits[0], recorded["first_logits"], LOGITS_ATOL)
    check_tokens_kept(trace, pruner, recorded, report)
    if "twig_scores" in recorded and scores:
        report.close("twig_scores", scores[-1], recorded["twig_scores"], SCORES_ATOL)
    if strategy == "self_speculative" and "draft_tokens" in recorded and clear:
        check_steps(output.logs[0], drafts, recorded, report)


def watched_scores(pruner) -> list:
    """The scores of visual tokens that `pruner` computes from here on."""
    scores, score = [], type(pruner).score

    def watched(prefill):
        scores.append(score(pruner, prefill)[prefill.is_visual])
        return score(pruner, prefill)

    pruner.score = watched
    return scores


def check_tokens_kept(trace, pruner, recorded, report):
    depth = len(trace.visual_tokens)
    if "kv_len_prefill" in recorded:
        lengths = [int(length[0]) for length in trace.kv_lengths]
        report.equal("kv_len_prefill", lengths, recorded["kv_len_prefill"].tolist())
    report.equal("n_prefill", trace.position_ids.shape[1], int(recorded["n_prefill"]))
    if not (count := int(recorded["n_visual"])):
        return
    embeds = torch.cat(trace.visual_embeds)
    report.equal("n_visual", len(embeds), count)
    if "visual_embeds" in recorded:
        report.close("visual_embeds", embeds, recorded["visual_embeds"], EMBEDS_ATOL)
    first, wipe = pruner.shared_layers(depth), pruner.wipe_layer(depth)
    kept = torch.arange(trace.position_ids.shape[1])
    for layer in (first, wipe):
        if f"decoder_keep_L{layer}" not in recorded:
            continue
        kept = trace.decoder_keep.get(layer, [kept])[0]
        report.equal(f"decoder_keep_L{layer}", kept, recorded[f"decoder_keep_L{layer}"])
        if f"position_ids_L{layer}" in recorded:
            positions = trace.position_ids[0][kept]
            report.equal(f"position_ids_L{layer}", positions, recorded[f"position_ids_L{layer}"])
        if layer == first:
            visual = kept - int(recorded["visual_start"])
            visual = visual[(visual >= 0) & (visual < len(embeds))]
            report.equal("keep_indices", visual, recorded["keep_indices"])
            report.equal("r", len(visual), int(recorded["r"]))


def check_steps(log, drafts, recorded, report):
    """Guesses, what was accepted of them, and cache lengths after every step."""
    report.close(
        "draft_first_logits", drafts[0][0, -1], recorded["draft_first_logits"], LOGITS_ATOL
    )
    report.equal("draft_len", list(map(len, log.drafts)), recorded["draft_len"].tolist())
    width = recorded["draft_tokens"].shape[1]
    padded = [step + [-1] * (width - len(step)) for step in log.drafts]
    report.equal("draft_tokens", padded, recorded["draft_tokens"].tolist())
    for ours, theirs in zip(log.probabilities, recorded["draft_probs"], strict=False):
        report.close("draft_probs", ours, theirs[: len(ours)], SCORES_ATOL)
    report.equal("accepted", log.accepted, recorded["accepted"].tolist())
    report.equal("bonus_token", log.bonus, recorded["bonus_token"].tolist())
    depth = recorded["kv_len_steps"].shape[1]
    base = [lengths[:depth] for lengths in log.kv_lengths]
    report.equal("kv_len_steps", base, recorded["kv_len_steps"].tolist())
    # The row of the last guess waits for the next step when all guesses were accepted.
    for number, (lengths, theirs) in enumerate(
        zip(log.kv_lengths, recorded["twig_kv_len_steps"].tolist(), strict=False)
    ):
        waiting = 0 < len(log.drafts[number]) == log.accepted[number]
        if log.drafts[number]:  # the release drops the twig's cache in a step without guesses
            ours = [length + waiting for length in lengths[depth:]]
            report.equal(f"twig_kv_len of step {number}", ours, theirs)


# Training.


def check_training(case, folder, report):
    recorded, args = load_arrays(case, folder), case["args"]
    model, batch = training_batch(case, folder)
    for key in ("input_ids", "labels", "attention_mask"):
        report.equal(key, batch[key].long(), recorded[key].astype(np.int64))
    training = TwigTraining(model, args["twig_K"], args["twig_T"])
    check_start(training, recorded, report)
    check_gradients(training, batch, recorded, report, LOSS_ATOL)
    check_trajectory(training, batch, args["optimizer"], recorded, report)


def training_batch(case, folder):
    """(model, batch) of the samples that were recorded."""
    args = case["args"]
    tokenizer, model, processor = load_checkpoint(case["checkpoint"], folder)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.model_max_length, side = args["model_max_length"], tokenizer.padding_side
    samples = args.get("samples") or [args["sample"]]
    names = (sample["image"] for sample in samples if sample.get("image"))
    images = locate(next(names, "img0_336x336.png"), folder).parent
    batch = collated(args | {"samples": samples}, tokenizer, processor, images)
    tokenizer.padding_side = side
    return model, batch


def collated(args, tokenizer, processor, image_folder):
    data_args = SimpleNamespace(
        image_folder=str(image_folder),
        image_processor=processor,
        image_aspect_ratio=args["image_aspect_ratio"],
        is_multimodal=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "data.json"
        path.write_text(json.dumps(args["samples"]))
        dataset = LazySupervisedDataset(str(path), tokenizer, data_args)
    return DataCollatorForSupervisedDataset(tokenizer)([dataset[i] for i in range(len(dataset))])


def check_start(training, recorded, report):
    """The twig before its first step."""
    weights = published_weights(training.twig)
    shapes = zip(recorded["checkpoint_names"], recorded["checkpoint_shapes"], strict=True)
    for name, shape in shapes:
        report.equal(f"shape of {name}", str(list(weights[name].shape)), str(shape))
    norms = [weights[str(name)].detach().norm().item() for name in recorded["param_names"]]
    report.close("init_norms", norms, recorded["init_norms"], 1e-4)


def published_weights(module, prefix: str = "") -> dict:
    """Parameters of `module` by the names that the release has for them under `prefix`."""
    return {published_name(prefix + name): p for name, p in module.named_parameters()}


def check_gradients(training, batch, recorded, report, *loss_tolerance):
    """What is trained, and the loss of a batch with its gradients."""
    names = [str(name) for name in recorded["param_names"]]
    weights = published_weights(training.twig)
    report.equal("trained parameters", sorted(weights), sorted(names))
    count = sum(p.numel() for p in training.parameters() if p.requires_grad)
    report.equal("n_trainable", count, int(recorded["n_trainable"]))
    supervised = (batch["labels"][:, 1:] != -100).sum()
    report.equal("n_supervised", int(supervised), int(recorded["n_supervised"]))
    loss = training(**batch)["loss"]
    report.close("loss", loss, recorded["loss"], *loss_tolerance)
    loss.backward()
    norms = [weights[name].grad.norm().item() for name in names]
    report.close("grad_norms", norms, recorded["grad_norms"], 1e-4, NORMS_RTOL)
    total = sum(norm**2 for norm in norms) ** 0.5
    report.close("grad_norm_total", total, recorded["grad_norm_total"], 1e-4, NORMS_RTOL)
    compare_gradients(weights, recorded, report, 1e-4, NORMS_RTOL)


def compare_gradients(weights, recorded, report, *tolerance):
    for key in recorded:
        if key == "grad__lm_head_rowsum":
            ours = weights["lm_head.weight"].grad.sum(dim=1)
        elif key.startswith("grad__"):
            ours = weights[key.removeprefix("grad__")].grad
        else:
            continue
        report.close(key, ours, recorded[key], *tolerance)


def check_trajectory(training, batch, options, recorded, report, atol=2e-4):
    """The loss before each of the recorded optimizer steps, and after the last."""
    optimizer = torch.optim.AdamW(
        training.parameters(),
        lr=options["lr"],
        betas=options["betas"],
        eps=options["eps"],
        weight_decay=options["weight_decay"],
    )
    losses = []
    for _ in range(options["steps"]):
        optimizer.zero_grad()
        loss = training(**batch)["loss"]
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    losses.append(training(**batch)["loss"].item())
    report.close("loss_trajectory", losses, recorded["loss_trajectory"], atol)
