"""DivPrune's recorded cases: order of the picks, and places in the unpruned image sequence."""

import numpy as np
import torch

from llava.pruning import Pruner, build_pruner, trace_pruning
from llava.pruning.divprune import farthest_first
from tests.golden_checks.compare import SCORES_ATOL


def build(case, folder) -> Pruner:
    return build_pruner("divprune", subset_ratio=case["args"]["subset_ratio"])


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    """Picks and their distances; kept places, as patches, on the sequence with newlines."""
    positions, embeds = unpruned(recorded, model, pixels, trace.image_sizes)
    report.equal("n_visual_before", len(embeds), int(recorded["n_visual_before"]))
    report.equal("tokens", pruner.num_tokens(len(embeds)), case["args"]["tokens"])
    order = farthest_first(embeds[None], case["args"]["tokens"])[0]
    if case.get("exact") is False and not np.array_equal(order, recorded["select_order"]):
        return False  # rounding decides here
    report.equal("select_order", order, recorded["select_order"])
    report.close("step_score", scores(embeds, order), recorded["step_score"], SCORES_ATOL)
    recorded["keep_indices"] = positions[recorded["keep_indices"]].numpy()
    return True


def unpruned(recorded, model, pixels, sizes):
    """(patch numbers, embeddings) of the image without a method."""
    pruner, model.pruner = model.pruner, build_pruner("none")
    with trace_pruning(model, embeds=True) as trace:
        model.build_prompt(
            torch.tensor(recorded["input_ids"])[None], images=pixels, image_sizes=sizes
        )
    model.pruner = pruner
    return trace.visual_positions[0], trace.visual_embeds[0]


def scores(embeds, order) -> np.ndarray:
    """Distance of every pick to its nearest neighbour, then to the picks before it."""
    unit = torch.nn.functional.normalize(embeds, dim=-1)
    distance = 1 - unit @ unit.T
    first = distance[order[0]].topk(2, largest=False).values[1]
    return torch.stack(
        [first, *(distance[order[i], order[:i]].min() for i in range(1, len(order)))]
    )


def check_select(case, folder, recorded, report):
    features = torch.tensor(recorded["features"]).float()
    order = farthest_first(features[None], case["args"]["tokens"])[0]
    report.equal("expected_order", order, recorded["expected_order"])
    report.equal("expected_keep", order.sort().values, recorded["expected_keep"])


FUNCTIONS = {"select": check_select}
