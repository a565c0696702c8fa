"""MMTok's recorded cases: ids of the question, and the order of the picks."""

import torch

from llava.pruning.mmtok import TAU_T, cover_both
from llava.pruning.questions import bare_question
from tests.golden_checks.methods import check_order, tensors


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    question = bare_question(case["question"])
    ids = model.tokenizer(question, add_special_tokens=False).input_ids
    report.equal("question_ids", ids, recorded["question_ids"].tolist())
    patches = model.get_vision_tower().tokens(pixels).features
    projected, texts = (
        model.get_model().mm_projector(patches),
        pruner.words([question], patches.device),
    )
    constants = TAU_T, pruner.tau_v, pruner.alpha
    order = cover_both(projected, patches, *texts, len(recorded["select_order"]), *constants)
    report.equal("select_order", order[0], recorded["select_order"])
    return True


def check_select(case, folder, recorded, report):
    patches, projected, words = tensors(recorded, "features", "projected", "text")
    weights = torch.full(words.shape[:2], 1 / max(1, words.shape[1]))
    constants = (case["args"][name] for name in ("tau_t", "tau_v", "alpha"))
    order = cover_both(projected, patches, words, weights, case["args"]["tokens"], *constants)
    check_order(order, recorded, report)


FUNCTIONS = {"select": check_select}
