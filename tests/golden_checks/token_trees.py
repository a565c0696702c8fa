"""Trees of guesses, step by step: what was guessed, what of it was accepted, what caches hold."""

from __future__ import annotations

import numpy as np

from tests.golden_checks.e2e import CLEAR_GAP, LOGITS_ATOL, greedy

#: smallest gap at which the choice of a candidate is not left to rounding, and scores so close
#: that their order is
CHOICE_GAP, ORDER_GAP = 2e-5, 1e-4


def check_trees(model, ids, images, case, recorded, report):
    """Self-speculation on prompts `ids` with the keywords `images`, against a recorded case."""
    args, drafts = case["args"], []
    end = args.get("eos_token_id")
    head = model.pruner.module.head.register_forward_hook(lambda _, x, y: drafts.append(y))
    try:
        output = model.generate(
            ids,
            **images,
            **greedy(args["max_new_tokens"], end),
            generation_strategy=args["generation_strategy"],
        )
    finally:
        head.remove()
    answer = [token for token in output.sequences[0].tolist() if token != end]
    clear = clear_tokens(recorded)
    report.equal("output_ids", answer[:clear], recorded["output_ids"].tolist()[:clear])
    report.close("first_logits", output.scores[0][0], recorded["first_logits"], LOGITS_ATOL)
    first = drafts[0][0, -1]
    report.close("draft_first_logits", first, recorded["draft_first_logits"], LOGITS_ATOL)
    check_steps(output.logs[0], recorded, clear, report)


def clear_tokens(recorded) -> int | None:
    """How many tokens come before the first that rounding decides; None: all are clear."""
    unclear = np.flatnonzero(recorded["step_gaps"] < CLEAR_GAP)
    return int(unclear[0]) if len(unclear) else None


def check_steps(log, recorded, clear: int | None, report):
    emitted = 0
    depth = recorded["kv_len_steps"].shape[1]
    for step, tree in enumerate(log.trees):
        if clear is not None and emitted > clear:
            return  # another text, other trees
        report.prefix = f"step {step}: "
        theirs = {name: recorded[f"tree_{name}"][step] for name in FIELDS}
        if recorded["tree_gap"][step] >= CHOICE_GAP:
            check_tree(tree, theirs, report)
        path, nodes = log.paths[step], recorded["accepted_nodes"][step]
        tokens = [int(tree.tokens[node - 1]) for node in path] + [log.bonus[step]]
        if clear is None or emitted + len(tokens) <= clear:
            report.equal("accepted", len(path), int(recorded["accepted"][step]))
            if ordered(theirs["scores"]):
                report.equal("accepted_nodes", path, nodes[nodes >= 0].tolist())
            wanted = recorded["emitted"][step]
            report.equal("emitted", tokens, wanted[wanted >= 0].tolist())
            lengths = log.kv_lengths[step]
            report.equal("kv_len", lengths[:depth], recorded["kv_len_steps"][step].tolist())
            # The release runs the first layers twice, and so counts them there as well.
            twig = recorded["twig_kv_len_steps"][step].tolist()[depth - len(lengths) :]
            report.equal("twig_kv_len", lengths[depth:], twig)
        emitted += len(tokens)
    report.prefix = ""
    if clear is None:
        report.equal("steps", len(log.trees), len(recorded["accepted"]))


FIELDS = ("tokens", "parents", "depth", "scores")


def check_tree(tree, recorded, report):
    """Node by node; where two scores are as good as equal, as a set of paths."""
    ours = {
        "tokens": tree.tokens.numpy(),
        "parents": tree.parents.numpy(),
        "depth": tree.depths.numpy(),
        "scores": tree.scores.numpy(),
    }
    if not ordered(recorded["scores"]):
        ours, recorded = scores_of_paths(ours), scores_of_paths(recorded)
        report.equal("paths", sorted(ours), sorted(recorded))
        common = sorted(ours.keys() & recorded.keys())
        ours, theirs = ([own[path] for path in common] for own in (ours, recorded))
        report.close("scores", ours, theirs, LOGITS_ATOL)
        return
    for name in FIELDS[:-1]:
        report.equal(name, ours[name].tolist(), recorded[name].tolist())
    report.close("scores", ours["scores"], recorded["scores"], LOGITS_ATOL)


def ordered(scores) -> bool:
    """Whether no two of them are so close that rounding orders their nodes."""
    return bool((np.diff(np.sort(scores)) >= ORDER_GAP).all())


def scores_of_paths(tree) -> dict[tuple[int, ...], float]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree["tokens"].tolist(), tree["parents"].tolist(), strict=True):
        paths.append((*paths[parent], token))
    return dict(zip(paths[1:], tree["scores"].tolist(), strict=True))
