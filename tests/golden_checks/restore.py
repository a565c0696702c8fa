"""RESTORE: groups, sizes and places; the bias, attention with it, and answers without its distance
term in the rows of answers."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from llava.model.language_model.attention import attend, attention_mask
from llava.model.language_model.layers import Rotary
from llava.model.position_bias import between, joined
from llava.pruning import build_pruner
from llava.pruning.density_merge import groups_of, merge
from llava.pruning.restore import Calibration
from llava.pruning.tokens import KEY_BIAS, MERGED
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.e2e import as_recorded, check_tokens


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    vision = model.encode_vision(pixels)
    places, merged = vision.positions, vision.extras[MERGED]
    report.equal("places", places[0], recorded["places"])
    sizes = vision.extras[KEY_BIAS].exp().round()
    report.equal("sizes", sizes[0].long(), recorded["sizes"])
    if anchors := len(recorded["anchors"]):
        model.pruner = build_pruner("none")
        whole = model.encode_vision(pixels).features
        _, found, _ = groups_of(whole, places[~merged][None], anchors)
        report.equal("anchors", found[0], recorded["anchors"])
    model.pruner = replace(pruner, calibrate_decode=False)
    ids = torch.tensor(recorded["input_ids"]).long()[None]
    wanted = {name: recorded[f"{name}_size_only"] for name in ("output_ids", "step_gaps")}
    out = model.generate(ids, images=pixels, **as_recorded(wanted))
    report.prefix = "answers without distances: "
    check_tokens(out.sequences[0], torch.stack(out.scores, dim=1)[0], wanted, report)
    report.prefix, model.pruner = "", pruner
    return True


def check_merge(case, folder, recorded, report):
    features, kept = torch.tensor(recorded["features"]).float(), torch.tensor(recorded["kept"])
    kept, count = kept.long(), case["args"]["anchors"]
    group, anchors, density = groups_of(features, kept, max(1, count))
    if count:
        report.equal("expected_anchors", anchors, recorded["expected_anchors"])
        target = torch.nn.functional.pad(anchors, (0, 1), value=-1).gather(1, group)
        report.equal("expected_target", target, recorded["expected_target"])
    if "expected_density" in recorded:
        report.close("expected_density", density, recorded["expected_density"], SCORES_ATOL)
    places, embeds, sizes, blended = merge(features, kept, count, 1.0)
    report.equal("expected_positions", places, recorded["expected_positions"])
    report.equal("expected_sizes", sizes.long(), recorded["expected_sizes"])
    report.close("expected_embeds", embeds, recorded["expected_embeds"], SCORES_ATOL)
    report.equal("merged tokens", blended.sum(dim=1), np.full(len(features), count))


def bias_of(case, recorded, queries: str, keys: str):
    """(1, Q, K) the bias by our own rotation, from recorded positions and sizes."""
    args = case["args"]
    rotary = Rotary(
        SimpleNamespace(
            hidden_size=args["head_dim"], num_attention_heads=1, rope_theta=args["rope_base"]
        )
    )
    places = (rotary.directions(torch.tensor(recorded[name])[None]) for name in (queries, keys))
    sizes = torch.tensor(recorded["sizes"]).float().log()[None]
    return joined(sizes, between(Calibration(c=args["c"]), *places))


def check_bias(case, folder, recorded, report):
    bias = bias_of(case, recorded, "query_positions", "key_positions")[0]
    report.close("expected_bias", bias, recorded["expected_bias"], 1e-5)


def check_attention(case, folder, recorded, report):
    q, k, v = (torch.tensor(recorded[x]).float()[None] for x in ("query", "key", "value"))
    mask = attention_mask(
        None, bias_of(case, recorded, "positions", "positions"), q.shape[2], q.dtype
    )
    for backend in ("sdpa", "eager"):
        rows = attend(q, k, v, mask, backend)[0][:, recorded["rows"]]
        report.close(f"expected_output ({backend})", rows, recorded["expected_output"], SCORES_ATOL)


def check_split(case, folder, recorded, report):
    for column, gamma in enumerate(recorded["gammas"].tolist()):
        pruner = build_pruner("restore", gamma=gamma)
        found = np.array([pruner.split(int(budget)) for budget in recorded["budgets"]])
        for name, own in zip(("expected_pruned", "expected_merged"), found.T, strict=True):
            report.equal(f"{name}, gamma {gamma}", own, recorded[name][:, column])


FUNCTIONS = {
    "merge": check_merge,
    "bias": check_bias,
    "attention": check_attention,
    "split": check_split,
}
