"""Visual tokens kept per question, as the answer lines record them, summed up over a benchmark.

Methods that decide by image and question how many tokens they need have no one budget: their
average, and how it is spread, is part of the result.
"""

from statistics import mean, quantiles

#: keys in the `metadata` of an answer line: tokens per layer on average, and without pruning
KEPT, ALL = "visual_tokens", "visual_tokens_unpruned"
NUM_BINS = 10


def summarize(answers: list[dict]) -> dict | None:
    """Returns average, ratio and distribution of the kept tokens, or None when none are recorded.

    Keys: `mean`, `ratio` (mean share kept), `min`, `p10`, `median`, `p90`, `max` (tokens per
    prompt, averaged over layers), `histogram` (questions by tenth of the share kept), `count`.
    """
    metadata = [answer.get("metadata") or {} for answer in answers]
    pairs = [(m[KEPT], m[ALL]) for m in metadata if m.get(ALL)]
    if not pairs:
        return None
    kept = [pair[0] for pair in pairs]
    shares = [part / whole for part, whole in pairs]
    histogram = [0] * NUM_BINS
    for share in shares:
        histogram[min(int(share * NUM_BINS), NUM_BINS - 1)] += 1
    deciles = quantiles(kept, n=10, method="inclusive") if len(kept) > 1 else kept * 9
    return {
        "mean": mean(kept),
        "ratio": mean(shares),
        "min": min(kept),
        "p10": deciles[0],
        "median": deciles[4],
        "p90": deciles[8],
        "max": max(kept),
        "histogram": histogram,
        "count": len(kept),
    }


def report(summary: dict) -> str:
    """One line; a second one where the number of tokens differs between questions."""
    text = (
        f"Visual tokens per layer: {summary['mean']:.1f} on average "
        f"({100 * summary['ratio']:.1f} % of all)\n"
    )
    if summary["min"] == summary["max"]:
        return text
    names = ("min", "p10", "median", "p90", "max")
    spread = ", ".join(f"{name} {summary[name]:.1f}" for name in names)
    bins = " ".join(map(str, summary["histogram"]))
    return f"{text}  {spread}\n  questions by share kept, 0 to 100 % in tenths: {bins}\n"
