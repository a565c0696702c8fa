"""HoloV's recorded cases: what every run gets, and its tokens in the order of the prompt."""

from llava.pruning.holov import best_of_runs, fitted, quotas, run_places, run_scores
from tests.golden_checks.methods import tensors


def check_select(case, folder, recorded, report):
    features, attention = tensors(recorded, "features", "attention")
    args, size = case["args"], features.shape[1]
    count, runs = min(args["tokens"], size), min(args["num_patches"], size)
    places, real = run_places(size, runs, features.device)
    scores = run_scores(features[:, places], attention[:, places], real, args["alpha"])
    quota, sizes = quotas(scores, count), real.sum(dim=1).expand(len(features), -1)
    report.equal("released_quota", quota, recorded["released_quota"])
    report.equal("expected_quota", fitted(quota, sizes, scores, size), recorded["expected_quota"])
    sequence = best_of_runs(features, attention, count, args["num_patches"], args["alpha"])
    report.equal("expected_sequence", sequence, recorded["expected_sequence"])
    report.equal("expected_keep", sequence.sort(dim=1).values, recorded["expected_keep"])


FUNCTIONS = {"select": check_select}
