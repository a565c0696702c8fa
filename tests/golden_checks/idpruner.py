"""IDPruner's recorded cases: order of the picks."""

from llava.pruning import build_pruner
from tests.golden_checks.methods import check_order, tensors, tokens_of


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    vision = model.get_vision_tower().tokens(pixels, pruner.needs)
    vision.features = model.get_model().mm_projector(vision.features)
    count = len(recorded["select_order"])
    report.equal(
        "select_order", pruner.pick(vision, slice(None), count)[0], recorded["select_order"]
    )
    return True


def check_select(case, folder, recorded, report):
    features, importance = tensors(recorded, "features", "importance")
    pruner = build_pruner("idpruner", mmr_lambda=case["args"]["mmr_lambda"])
    vision = tokens_of(features, salience=importance)
    check_order(pruner.pick(vision, slice(None), case["args"]["tokens"]), recorded, report)


FUNCTIONS = {"select": check_select}
