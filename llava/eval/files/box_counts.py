"""Kept tokens against boxes around what a question is about, as answer lines record them."""

from __future__ import annotations

from statistics import mean

import numpy as np

from llava.eval.files import budgets

#: key in the `metadata` of an answer line, and those of the object it holds: tokens that were kept
#: inside and outside of the boxes, that were dropped inside, all tokens, intersection over union
KEY = "boxes"
INSIDE, OUTSIDE, MISSED, ALL, IOU = "kept_inside", "kept_outside", "dropped_inside", "tokens", "iou"


def counts(kept: np.ndarray, reference: np.ndarray) -> dict:
    """The object for `KEY`, from two masks of one shape."""
    inside, outside = int((kept & reference).sum()), int((kept & ~reference).sum())
    missed = int((~kept & reference).sum())
    iou = _share(inside, inside + outside + missed)
    return {INSIDE: inside, OUTSIDE: outside, MISSED: missed, ALL: kept.size, IOU: round(iou, 4)}


def of(answer: dict) -> dict | None:
    """What an answer line says of boxes."""
    found = (answer.get("metadata") or {}).get(KEY)
    complete = isinstance(found, dict) and {INSIDE, OUTSIDE, MISSED, ALL, IOU} <= found.keys()
    return found if complete else None


def kept_share(answer: dict) -> float | None:
    """Share of the visual tokens that an answer line says were left in the last layer."""
    metadata = answer.get("metadata") or {}
    if not metadata.get(budgets.ALL):
        return None
    return metadata.get(budgets.AT_END, metadata[budgets.PER_LAYER]) / metadata[budgets.ALL]


def summarize(answers: list[dict]) -> dict | None:
    """Returns how the kept tokens meet the boxes, or None when no line says so.

    Keys as published: `mPrecision`, `mRecall`, `mF1`, `mIoU`, from tokens summed over the lines,
    `mRatio`, the mean share of the tokens that was kept; and `inBoxes`, the mean share that lies
    inside the boxes, and `count`.
    """
    known = [answer for answer in answers if of(answer)]
    if not known:
        return None
    found = [of(answer) for answer in known]
    inside, outside, missed = (sum(own[key] for own in found) for key in (INSIDE, OUTSIDE, MISSED))
    ratios = [kept_share(answer) for answer in known]
    ratios = [1.0 if ratio is None else ratio for ratio in ratios]  # nothing was pruned
    return {
        "mPrecision": _share(inside, inside + outside),
        "mRecall": _share(inside, inside + missed),
        "mF1": _share(2 * inside, 2 * inside + outside + missed),
        "mIoU": _share(inside, inside + outside + missed),
        "mRatio": mean(ratios),
        "inBoxes": mean(_share(own[INSIDE] + own[MISSED], own[ALL]) for own in found),
        "count": len(known),
    }


def report(summary: dict) -> str:
    """One line of text."""
    numbers = ", ".join(
        f"{name} {100 * summary[key]:.1f} %"
        for name, key in (
            ("precision", "mPrecision"),
            ("recall", "mRecall"),
            ("F1", "mF1"),
            ("IoU", "mIoU"),
            ("kept", "mRatio"),
        )
    )
    return f"Kept tokens against boxes: {numbers} ({100 * summary['inBoxes']:.1f} % lie in boxes)\n"


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
