"""The budgets of a sweep: which ones are proposed, and how they are read from a text."""

from __future__ import annotations

import re

from .failures import Failure

MOST = 8  # budgets of a sweep
#: what is proposed, as shares of an image's tokens; of 576: 16, 32, 64, 128 and 192
PROPOSED = (1 / 36, 1 / 18, 1 / 9, 2 / 9, 1 / 3)


def proposed(dense: int | None) -> str:
    """The text with budgets for images of `dense` tokens; None: every image has its own number."""
    if dense is None:
        return ", ".join(f"{100 * share:.3g}%" for share in PROPOSED)
    counts = dict.fromkeys(max(1, round(dense * share)) for share in PROPOSED)
    return ", ".join(map(str, counts))


def read_budgets(text: str) -> list[tuple[float, bool]]:
    """(budget, whether it is percent of an image's tokens), in their order. Raises Failure."""
    text = re.sub(r"\s+%", "%", text)  # "11.1 %", as the page itself writes it
    words = text.replace(",", " ").replace(";", " ").split()
    if not words or len(words) > MOST:
        raise Failure(
            "bad_budgets", f"Name 1 to {MOST} budgets, for example 16, 32, 64 or 5%, 10%."
        )
    return list(dict.fromkeys(map(_budget, words)))


def _budget(word: str) -> tuple[float, bool]:
    share = word.endswith("%")
    try:
        value = float(word.removesuffix("%")) if share else int(word)
    except ValueError:
        value = 0
    if not 0 < value <= (100 if share else 100_000):
        raise Failure(
            "bad_budgets",
            f"{word[:20]!r} is no budget: a number of tokens, or a share such as 11%.",
        )
    return value, share


def budget_text(value: float, share: bool) -> str:
    return f"{value:g} %" if share else f"{value:g}"
