"""SparseVLM: versions, scores and merged tokens, and its clustering and rating alone."""

from types import SimpleNamespace

import numpy as np
import torch

from llava.model.language_model.modeling_llama import Rotary
from llava.pruning import build_pruner
from llava.pruning.density_peaks import cluster
from llava.pruning.sparsevlm import RETAINED, nearness
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.e2e import entering
from tests.golden_checks.methods import given

VERSIONS = {"1_0": "1.5", "2_0": "2.0", "rank": "1.0"}
#: scores of version 2.0 are quotients by small numbers
QUOTIENT_RTOL = 1e-2


def build(case, folder):
    options = given(
        case["args"],
        "pruning_layers",
        "num_selected_heads",
        "scale",
        "bias",
        per_stage_topk="retained_tokens",
    )
    if "retained_tokens" not in options:
        options |= given(case["args"], "visual_token_num")
    return build_pruner("sparsevlm", version=VERSIONS[case["version"]], **options)


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    """What entered every layer, merged tokens by their stage and number in it."""
    merged: list[int] = []
    for stage, layer in enumerate(pruner.stage_layers(len(trace.kv_lengths)), start=1):
        name = f"decoder_keep_L{layer + 1}"
        count = recorded.get(f"merged_tokens_L{layer + 1}", np.zeros((0, 0))).shape[0]
        merged += [-(1000 * stage + number) for number in range(count)]
        ours = entering(trace, layer + 1).tolist()
        ours = [place if place >= 0 else merged[-1 - place] for place in ours]
        report.equal(name, np.array(ours), recorded.pop(name))
    published = case["args"].get("visual_token_num")
    if published in RETAINED.get(pruner.version, ()):
        label = build_pruner("sparsevlm", version=pruner.version, visual_token_num=published)
        report.equal("published stages", list(label.allowed(576)), case["args"]["per_stage_topk"])
    return True


def check_cluster(case, folder, recorded, report):
    tokens = torch.tensor(recorded["tokens"])[None]
    count = case["args"]["num_clusters"]
    valid = torch.ones(tokens.shape[:2], dtype=torch.bool)
    centres, assign, merged, density, distance = cluster(
        tokens, valid, torch.tensor([count]), count
    )
    report.close("density", density[0], recorded["density"], SCORES_ATOL)
    report.close("parent_distance", distance[0], recorded["parent_distance"], SCORES_ATOL)
    report.equal("centers", centres[0], recorded["centers"])
    report.equal("assign", assign[0], recorded["assign"])
    report.close("merged", merged[0], recorded["merged"], SCORES_ATOL)


def check_score(case, folder, recorded, report):
    args, version = case["args"], VERSIONS[case["version"]]
    attention = torch.tensor(recorded["attn_rater_rows"])[None]
    start, stop = args["visual_start"], args["visual_start"] + args["n_visual"]
    places = torch.arange(attention.shape[-1])
    own = ((places >= start) & (places < stop))[None, None]
    weights = torch.ones(1, 1, attention.shape[2])
    heads = args["num_selected_heads"] or 14
    pruner = build_pruner("sparsevlm", version=version, num_selected_heads=heads)
    if version == "2.0":
        config = SimpleNamespace(
            hidden_size=args["num_heads"] * args["head_dim"], num_attention_heads=args["num_heads"]
        )
        rows = torch.tensor(recorded["text_rater_idx"])[None] + stop
        positions = torch.tensor(recorded["position_ids"])[None]
        pull = nearness(Rotary(config), positions, rows)
        report.close("rope_bias", pull[0, 0], recorded["rope_bias_rater_rows"], 1e-3)
        attention = attention / pull
    score = pruner.score(attention, weights, own)[0, start:stop]
    rtol = QUOTIENT_RTOL if version == "2.0" else 0.0
    report.close("scores", score, recorded["scores"], SCORES_ATOL, rtol)
    best = score.argsort(descending=True, stable=True)[: args["topk"]].sort().values
    report.equal("kept_visual", best, recorded["kept_visual"])


FUNCTIONS = {"cluster_and_merge": check_cluster, "score_topk": check_score}
