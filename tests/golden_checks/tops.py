"""TOPS: sets and raters on recorded inputs, and the picks of every stage of whole models."""

import torch

from llava.pruning import build_pruner, trace_pruning
from llava.pruning.tops import TOPS, above_mean, preserve
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.methods import given


def build(case, folder):
    return build_pruner("tops", **given(case["args"], "visual_token_num", "alpha", "lam"))


class Watched(TOPS):
    """Notes what its stages saw and chose."""

    def first_picks(self, *given):
        self.first = super().first_picks(*given)
        return self.first

    def score(self, prefill, kept):
        score = super().score(prefill, kept)
        words, rows = prefill.state.words, prefill.attention.mean(dim=1)
        looks = prefill.own_tokens().float() @ rows.transpose(1, 2)
        own = score[0][prefill.is_visual[0]]
        order = own.argsort(descending=True, stable=True)[: kept[0][0]]
        raters = above_mean(looks, words.own)[0, 0]
        self.seen = {**getattr(self, "seen", {}), prefill.layer: (raters, order)}
        return score


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    watched = Watched(**given(case["args"], "visual_token_num", "alpha", "lam"))
    model.pruner = watched
    ids = torch.tensor(recorded["input_ids"])[None].long()
    with torch.no_grad(), trace_pruning(model):
        model(ids, images=pixels)
    model.pruner = pruner
    report.equal("stage1_order", watched.first[0], recorded["stage1_order"])
    for layer in (13, 25):
        raters, order = watched.seen[layer]
        report.equal(f"raters_L{layer}", raters, recorded[f"raters_L{layer}"])
        report.equal(f"order_L{layer}", order, recorded[f"order_L{layer}"])
    return True


def check_select(case, folder, recorded, report):
    args = case["args"]
    features, relevance = (torch.tensor(recorded[n]).float() for n in ("features", "relevance"))
    weights = torch.tensor([[args["lam"], args["alpha"]]]).expand(len(features), -1)
    real = torch.ones(relevance.shape, dtype=torch.bool)
    order, scores = preserve(
        features, relevance, real, weights, args["tokens"], args["normalize"] == "mean"
    )
    report.equal("expected_order", order, recorded["expected_order"])
    report.equal("expected_keep", order.sort(dim=1).values, recorded["expected_keep"])
    report.close("step_score", scores, recorded["step_score"], SCORES_ATOL, SCORES_ATOL)


def check_raters(case, folder, recorded, report):
    attention = torch.tensor(recorded["attention"]).float()
    looks = attention.sum(dim=1)
    raters = above_mean(looks, torch.ones_like(looks, dtype=torch.bool))
    report.equal("expected_raters", raters, recorded["expected_raters"])
    report.close("expected_mass", looks, recorded["expected_mass"], SCORES_ATOL)
    report.close(
        "relevance", attention[raters].mean(0), recorded["expected_relevance"], SCORES_ATOL
    )


FUNCTIONS = {"select": check_select, "raters": check_raters}
