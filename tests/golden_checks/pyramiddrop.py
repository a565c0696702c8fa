"""PyramidDrop: scores of every stage, and single stages on recorded hidden states."""

import torch

from llava.pruning import Prefill, build_pruner
from tests.golden_checks.compare import SCORES_ATOL
from tests.golden_checks.e2e import EMBEDS_ATOL
from tests.golden_checks.methods import given
from tests.golden_checks.models import load_checkpoint


def build(case, folder):
    options = given(case["args"], "layer_list", "image_token_ratio_list", "visual_token_num")
    return build_pruner("pyramiddrop", **options)


def check_select(case, folder, recorded, report):
    """One stage, with right padding where it was recorded so; ours stands on the left."""
    args = case["args"]
    _, model, _ = load_checkpoint(case["checkpoint"], folder)
    features = torch.tensor(recorded["features"])
    batch, size, _ = features.shape
    ratios, stage = args["ratios"], args["stage"]
    alive = int(args["n_visual_full"] * ratios[stage])
    places = torch.arange(size).expand(batch, -1)
    visual = (places >= args["image_start"]) & (places < args["image_start"] + alive)
    valid = torch.tensor(recorded["attention_mask"]).bool() if args["padded"] else None
    prefill = Prefill(
        decoder=model.model,
        layer=args["decoder_layer"],
        hidden_states=features,
        position_ids=places,
        visual_index=visual.long() - 1,
        patch_index=torch.full_like(places, -1),
        index=places,
        valid=valid,
    )
    with torch.no_grad():
        score = prefill.next_attention()
    kept = prefill.keep_visual(score, int(args["n_visual_full"] * ratios[stage + 1]), True)
    for row in range(batch):
        report.prefix = f"row {row}: "
        report.close("scores", score[row][visual[row]], recorded[f"scores_b{row}"], SCORES_ATOL)
        chosen = kept.index[row][kept.visual_index[row] >= 0]
        report.equal("kept", chosen, recorded[f"kept_abs_b{row}"])
        real = slice(None) if kept.valid is None else kept.valid[row]
        count = kept.index.shape[1] if kept.valid is None else int(kept.valid[row].sum())
        ours, theirs = kept.hidden_states[row][real], recorded["new_features"][row][:count]
        report.close("new_features", ours, theirs, EMBEDS_ATOL)
        positions = recorded["new_position_ids"][row][:count]
        report.equal("new_position_ids", kept.position_ids[row][real], positions)
    report.prefix = ""
    if args["padded"]:
        lengths = recorded["new_attention_mask"].sum(axis=1)
        report.equal("tokens left", kept.valid.sum(dim=1), lengths)


FUNCTIONS = {"select": check_select}
