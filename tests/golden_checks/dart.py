"""DART: its selection on recorded states and keys, and pivots and turns of whole models."""

from types import SimpleNamespace

import numpy as np
import torch

from llava.pruning import Prefill, build_pruner
from llava.pruning.dart import DART
from tests.golden_checks.methods import given


def build(case, folder):
    options = given(case["args"], "visual_token_num", "layer")
    return build_pruner("dart", **options)


def prompts_of(hidden, keys, start, count) -> Prefill:
    """Rows that enter layer 2, each with one image.

    hidden (B, S, D), keys (B, S, K); start, count (B, 1): the places of the images
    """
    places = torch.arange(hidden.shape[1]).expand(len(hidden), -1)
    return Prefill(
        decoder=SimpleNamespace(final_norm=lambda x: x),
        layer=2,
        hidden_states=hidden,
        position_ids=places,
        visual_index=((places >= start) & (places < start + count)).long() - 1,
        patch_index=places - start,
        index=places,
        valid=None,
        keys=keys[:, None],
    )


class Watched(DART):
    """Notes the prefill that it scores, and the scores."""

    def score(self, prefill):
        self.seen = prefill, super().score(prefill)
        return self.seen[1]


def order_of(score, start: int, count: int) -> np.ndarray:
    """Places inside the image in the order in which they were taken, from scores (S,)."""
    own = score[start : start + count]
    return own.argsort(descending=True, stable=True)[: int((own > 0).sum())].numpy()


def check(case, recorded, model, pruner, pixels, trace, report) -> bool:
    """What was taken in which order: run again with a method that notes it."""
    watched = Watched(pruner.visual_token_num, layer=pruner.layer, key_states=pruner.key_states)
    model.pruner = watched
    ids = torch.tensor(recorded["input_ids"])[None]
    with torch.no_grad():
        model(ids.long(), images=pixels)
    model.pruner = pruner
    prefill, score = watched.seen
    start = int(prefill.is_visual[0].int().argmax())
    count = int(prefill.is_visual[0].sum())
    order = order_of(score[0], start, count)
    report.equal("dart_order", order, recorded["dart_order"])
    words = watched.pivots(prefill, *prefill.images())[1][0]
    report.equal("pivots_text", words, recorded["pivots_text"])
    report.equal("pivots_visual", order[:4], recorded["pivots_visual"])
    return True


def check_select(case, folder, recorded, report):
    """All prompts of a case at once."""
    args, arrays = case["args"], {name: torch.tensor(own) for name, own in recorded.items()}
    hidden, keys = arrays["hidden"].float(), arrays["keys"].float()
    start, count = arrays["start"][:, None].long(), arrays["count"][:, None].long()
    pruner = build_pruner(
        "dart",
        visual_token_num=args["tokens"],
        pivot_image_token=args["pivot_image_token"],
        pivot_text_token=args["pivot_text_token"],
        rule=args["rule"],
        key_states="input",  # the keys are given
    )
    lengths = count[:, 0].tolist()
    prefill = prompts_of(hidden, keys, start, count)
    prefill.image_extras = {"budget": [[pruner.kept_of(args["tokens"], n)] for n in lengths]}
    score = pruner.score(prefill)
    kept = prefill.keep_visual(score, pruner.budgets(prefill))
    for row, (first, size) in enumerate(zip(start[:, 0].tolist(), lengths, strict=True)):
        report.prefix = f"row {row}: "
        wanted = {
            name: own[row][own[row] >= 0] for name, own in recorded.items() if "expected" in name
        }
        chosen = kept.index[row][kept.is_visual[row]] - first
        report.equal("kept", chosen, wanted["expected_keep"])
        if len(wanted["expected_keep"]) == size:
            continue  # nothing is dropped, and nothing was chosen
        report.equal("order", order_of(score[row], first, size), wanted["expected_order"])
        visual, words = pruner.pivots(prefill, *prefill.images())[:2]
        report.equal(
            "visual pivots",
            visual[row][: len(wanted["expected_pivots_visual"])],
            wanted["expected_pivots_visual"],
        )
        report.equal(
            "words",
            words[row][: len(wanted["expected_pivots_text"])],
            wanted["expected_pivots_text"],
        )
    report.prefix = ""


FUNCTIONS = {"select": check_select}
