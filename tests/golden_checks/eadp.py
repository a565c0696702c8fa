"""EADP's recorded cases: relevance and its steps, budgets of crops, order of the picks."""

import torch

from llava.pruning import Pruner, build_pruner
from llava.pruning.eadp import RELEVANCE, cover_relevant
from llava.pruning.ops import normalize, shared_out
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.methods import budget, check_order, given, tensors, tokens_of


def build(case, folder) -> Pruner:
    return build_pruner("eadp", visual_token_num=budget(case), **options(case["args"]))


def options(args: dict) -> dict:
    return given(args, "tau", "gamma", "mu", "beta", q="quantile")


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    vision = model.get_vision_tower().tokens(pixels)
    vision.image_index, vision.questions = torch.zeros(1, dtype=torch.long), [case["question"]]
    vision = pruner.after_encoder(vision)
    relevance = vision.extras[RELEVANCE]
    report.close("relevance", relevance, recorded["relevance"], SCORES_ATOL)
    (reading,) = pruner.module.read([case["question"]], words=True)
    report.equal("words", len(reading.words), recorded["text_kept"].shape[1])
    features = model.get_model().mm_projector(vision.features)
    order = cover_relevant(features, relevance, len(recorded["select_order"]))
    report.equal("select_order", order[0], recorded["select_order"])
    return True


def check_relevance(case, folder, recorded, report) -> torch.Tensor:
    patches, words, ends = tensors(recorded, "image_embeds", "text_tokens", "eos")
    pruner, grid = build_pruner("eadp", **options(case["args"])), tuple(case["args"]["grid"])
    atol = case.get("atol", SCORES_ATOL)
    if not len(ends):  # nothing was asked
        relevance = pruner.relevance_left(tokens_of(patches))
        report.close("expected_relevance", relevance, recorded["expected_relevance"], atol)
        return relevance
    words, question = [normalize(words)], normalize(ends).mean(dim=0, keepdim=True)
    of_one_image = torch.zeros(len(patches), dtype=torch.long)
    if "expected_entropy" in recorded and len(words[0]):
        entropy = pruner.entropies(pruner.distances(normalize(patches), words, of_one_image))
        report.close("expected_entropy", entropy, recorded["expected_entropy"], atol, 1e-5)
        counting = pruner.counting(entropy, [len(words[0])], of_one_image)
        report.equal("expected_text_kept", counting, recorded["expected_text_kept"])
    relevance = pruner.relevance(patches, words, question, of_one_image, grid)
    report.close("expected_relevance", relevance, recorded["expected_relevance"], atol)
    return relevance


def check_select(case, folder, recorded, report):
    features, relevance = tensors(recorded, "features", "relevance")
    tokens, size = case["args"]["tokens"], features.shape[1]
    if case["args"]["crops"] == 1:
        return check_order(cover_relevant(features, relevance, tokens), recorded, report)
    counts = shared_out(relevance.sum(dim=1).tolist(), [size] * len(features), tokens)
    report.equal("expected_quota", counts, recorded["expected_quota"].flatten().tolist())
    order = cover_relevant(features, relevance, size)
    for row, count in enumerate(counts):
        own = {k: recorded[k][row : row + 1] for k in ("expected_order", "expected_keep")}
        check_order(order[row : row + 1, :count], own, report)


def check_both(case, folder, recorded, report):
    relevance = check_relevance(case, folder, recorded, report)
    (features,) = tensors(recorded, "features")
    check_order(cover_relevant(features, relevance, case["args"]["tokens"]), recorded, report)


def check_quota(case, folder, recorded, report):
    weights, sizes = recorded["weights"].tolist(), recorded["caps"].tolist()
    counts = shared_out(weights, sizes, case["args"]["tokens"])
    report.equal("expected_quota", counts, recorded["expected_quota"].tolist())


FUNCTIONS = {
    "relevance": check_relevance,
    "select": check_select,
    "quota": check_quota,
    "relevance_and_select": check_both,
}
