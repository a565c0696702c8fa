"""TwigVLM++: what its pruning head keeps, the trees that its twig guesses, and the training of both
its stages."""

import atexit
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from llava.mm_utils import tokenizer_image_token
from llava.pruning import build_pruner, trace_pruning
from llava.pruning.twig_files import OUR_HEAD, read_twig
from llava.train.twig_plus import distillation
from llava.train.twig_plus.distillation import Distillation, TwigDistillation
from llava.train.twig_plus.losses import (
    RELEASED_KEPT,
    candidates,
    divergence_weight,
    log_chances,
    worth,
)
from llava.train.twig_plus.policy import (
    Cuts,
    HeadReinforcement,
    Reinforcement,
    Sample,
    Selections,
)
from tests.golden_cases import load_arrays, locate
from tests.golden_checks.e2e import LOGITS_ATOL, clear_steps, greedy, image_names, prompt_of
from tests.golden_checks.methods import PATCHES, given
from tests.golden_checks.models import load_checkpoint, open_images, prepare
from tests.golden_checks.token_trees import check_trees
from tests.golden_checks.twigvlm import (
    check_gradients,
    check_tokens_kept,
    check_trajectory,
    compare_gradients,
    published_weights,
    training_batch,
    transformed,
    watched_scores,
)

SAME = ("twig_K", "twig_T", "enable_pruning", "final_wipe_layer", "tree_depth")
OPTIONS = {"tree_top_k": "tree_width", "tree_total_tokens": "tree_nodes"}
SCORES_ATOL, TRAJECTORY_ATOL = 1e-5, 5e-4
#: absolute, relative
LOSS = 2e-5, 2e-6
#: K, the layer of the wipe, and all layers
RELEASED = 2, 24, 32


#: a recorded twig -> that of TwigVLM with the same tensors, but for the gates
WITHOUT_GATES = {"twigpp_a_random": "twig_a_k2t3_random", "twigpp_b_near": "twig_c_k2t3_near"}


def twig_folder(case, folder) -> str:
    """The twig of a case; of those that ship the gates alone are beside it."""
    found = locate(case["args"]["twig"], folder)
    gates = found / "gates.safetensors"
    return assembled(gates) if gates.exists() else str(found)


@lru_cache
def assembled(gates: Path) -> str:
    """A folder with these gates and what there is of the twig in TwigVLM's cases."""
    name = gates.parent.name
    rest = locate(WITHOUT_GATES[name], gates.parents[1]) / "model.safetensors"
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_file(load_file(rest) | load_file(gates), folder / "model.safetensors")
    return str(folder)


def build(case, folder):
    args = case["args"]
    options = given(args, *SAME, **OPTIONS)
    if (rank := args.get("avg_retain_rank")) is not None:
        options["visual_token_num"] = min(rank, PATCHES)
    return build_pruner("twigvlm_plus", twig=twig_folder(case, folder), **options)


def check_e2e(case, folder, report):
    CHECKS[case["args"].get("mode", "inference")](case, folder, report)


def check_inference(case, folder, report):
    recorded, args = load_arrays(case, folder), case["args"]
    tokenizer, model, processor = load_checkpoint(case["checkpoint"], folder)
    pruner = model.pruner = build(case, folder)
    prompt = prompt_of(case, case["question"])
    ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
    report.equal("input_ids", ids[0], recorded["input_ids"])
    images = {}
    if image_names(case):
        pixels, sizes = prepare(open_images(image_names(case), folder), model, processor)
        images = {"images": pixels, "image_sizes": sizes}
    with transformed(model, args["base_transform"]):
        check_kept(model, pruner, ids, images, case, recorded, report)
        check_trees(model, ids, images, case, recorded, report)


def check_kept(model, pruner, ids, images, case, recorded, report):
    """Token by token: scores, what is kept of them, and the answer."""
    args, scores = case["args"], watched_scores(pruner)
    end = args["eos_token_id"]
    with trace_pruning(model, embeds=True) as trace:
        output = model.generate(
            ids,
            **images,
            **greedy(args["max_new_tokens"], end),
        )
    del pruner.score
    answer = [token for token in output.sequences[0].tolist() if token != end]
    logits = torch.cat(output.scores)
    steps = clear_steps(logits)
    wanted = recorded["output_ids_autoregressive"].tolist()
    report.equal("output_ids", answer[:steps], wanted[:steps])
    report.close("first_logits", logits[0], recorded["first_logits"], LOGITS_ATOL)
    if "phead_scores" in recorded:
        report.close("phead_scores", scores[0], recorded["phead_scores"], SCORES_ATOL)
    check_tokens_kept(trace, pruner, recorded, report)


# Training.


def started(case, folder, report, recorded):
    """(model, batch) of the recorded samples."""
    model, batch = training_batch(case, folder)
    for key in ("input_ids", "labels", "attention_mask"):
        if key in recorded:
            report.equal(key, batch[key].long(), recorded[key].astype(np.int64))
    return model, batch


def check_stage1(case, folder, report):
    recorded, args = load_arrays(case, folder), case["args"]
    model, batch = started(case, folder, report, recorded)
    with transformed(model, args["base_transform"]):
        names = ("alpha", "gamma", "temperature", "clip", "attention_layer")
        weights = Distillation(**{name: args[name] for name in names})
        training = TwigDistillation(model, args["twig_K"], args["twig_T"], weights)
        _, tensors = read_twig(twig_folder(case, folder))
        gates = {name: tensors[name] for name in training.twig.state_dict() if OUR_HEAD in name}
        training.twig.load_state_dict(gates, strict=False)
        check_parts(training, batch, recorded, report)
        check_gradients(training, batch, recorded, report, *LOSS)
        check_trajectory(training, batch, args["optimizer"], recorded, report, TRAJECTORY_ATOL)


def check_parts(training, batch, recorded, report):
    """Scores, every token's divergence, and what they add up to."""
    seen = {}

    def kept(name, function):
        def watched(*values):
            seen[name] = values, function(*values)
            return seen[name][1]

        return mock.patch.object(distillation, name, watched)

    functions = (distillation.score_divergence, distillation.token_divergences)
    with kept("score_divergence", functions[0]), kept("token_divergences", functions[1]):
        out = training(**batch)
    (teacher, student, real), samples = seen["score_divergence"]
    shown = real.any(dim=1)
    report.close("teacher_scores", teacher[shown], recorded["teacher_scores"], SCORES_ATOL)
    report.close("student_scores", student[shown], recorded["student_scores"], SCORES_ATOL)
    report.close("attnkl_samples", samples, recorded["attnkl_samples"], *LOSS)
    tokens = seen["token_divergences"][1]
    report.close("predkl_tokens", tokens, recorded["predkl_tokens"], 1e-4, 1e-4)
    report.equal("clipped", int((tokens > training.weights.clip).sum()), int(recorded["clipped"]))
    for ours, theirs in (("ntp", "ntp"), ("pred_kl", "predkl"), ("attn_kl", "attnkl")):
        report.close(theirs, out[ours], recorded[theirs], *LOSS)


def check_stage2(case, folder, report):
    recorded, args = load_arrays(case, folder), case["args"]
    model, batch = started(case, folder, report, recorded)
    with transformed(model, args["base_transform"]):
        method = build(case, folder)
        method.attach(model)
        settings = Reinforcement(
            args["num_groups"], args["beta_max"], args["power"], attention_layer=19
        )
        cuts = Cuts(args["twig_K"], args["final_wipe_layer"])
        training = HeadReinforcement(model, method.module, cuts, settings)
        check_selections(training, batch, recorded, report)


def check_selections(training, batch, recorded, report):
    """With the recorded draws: what selections cost, and what is learned from them."""
    with torch.no_grad():
        prompt = training.trunk.build_prompt(**batch)
    sample = Sample.of(prompt, 0, training.trunk.model)
    report.equal("query_index", int(sample.asked.asking), int(recorded["query_index"]))
    entered, teacher, scores = training.scored(sample)
    report.close("student_scores", scores, recorded["student_scores"], SCORES_ATOL)
    report.close("teacher_scores", teacher, recorded["teacher_scores"], SCORES_ATOL)
    budgets = candidates(len(scores), *RELEASED)
    report.equal("budgets", budgets, list(RELEASED_KEPT))
    chosen = torch.tensor(recorded["sampled"].astype(np.int64))
    with torch.no_grad():
        costs, count = training.costs(sample, entered, chosen)
    report.close("neg_reward", costs, recorded["neg_reward"], 5e-5, 2e-6)
    report.equal("n_supervised", count, int(recorded["n_supervised"]))
    report.close("advantage", worth(costs), recorded["advantage"], 2e-3)
    report.close("log_probs", log_chances(scores, chosen), recorded["log_probs"], 5e-3)
    given = torch.tensor(recorded["neg_reward"])  # a tiny error of theirs is a larger one of worth
    selections = Selections(chosen, budgets[0], budgets[-1])
    out = training.losses(scores, teacher, selections, given)
    report.close("policy_loss", out["policy"], recorded["policy_loss"], 3e-3)
    report.close("kl", out["attn_kl"], recorded["kl"], *LOSS)
    report.close("loss", out["loss"], recorded["loss"], 3e-3)
    gamma = divergence_weight(chosen.shape[1], budgets[0], budgets[-1], squared=False)
    report.close("gamma", gamma, recorded["gamma"], 1e-6)
    out["loss"].backward()
    weights = published_weights(training.head, OUR_HEAD)
    compare_gradients(weights, recorded, report, 5e-3, 2e-3)


CHECKS = {"inference": check_inference, "stage1": check_stage1, "stage2": check_stage2}
