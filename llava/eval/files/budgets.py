"""Visual tokens kept per question, as the answer lines record them, summed up over a benchmark.

Methods that decide by image and question how many tokens they need have no one budget: their
average, and how it is spread, is part of the result.
"""

from statistics import mean, quantiles

#: keys in the `metadata` of an answer line: tokens of the prompt per decoder layer, on average, in
#: the last layer, and without pruning
PER_LAYER, AT_END, ALL = "visual_tokens", "visual_tokens_at_end", "visual_tokens_unpruned"
NUM_BINS = 10


def summarize(answers: list[dict]) -> dict | None:
    """Returns average, share and distribution of the kept tokens, or None when none are recorded.

    Keys: `mean` (tokens per prompt, averaged over layers: the budget of the published tables),
    `ratio` (mean share of the unpruned tokens), `min`, `p10`, `median`, `p90`, `max`, `histogram`
    (questions by tenth of that share), `count`; and the same in `at_end` for the tokens left in the
    last layer, which is what papers on dynamic pruning call retention.
    """
    metadata = [answer.get("metadata") or {} for answer in answers]
    metadata = [record for record in metadata if record.get(ALL)]
    if not metadata:
        return None
    whole = [record[ALL] for record in metadata]
    summary = _distribution([record[PER_LAYER] for record in metadata], whole)
    at_end = [record.get(AT_END, record[PER_LAYER]) for record in metadata]
    return summary | {"count": len(metadata), "at_end": _distribution(at_end, whole)}


def _distribution(kept: list[float], whole: list[int]) -> dict:
    shares = [part / all_ for part, all_ in zip(kept, whole, strict=True)]
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
    }


def report(summary: dict) -> str:
    """A line on the average over layers, one on the last layer where that differs, and the spread
    where the number of tokens differs between questions."""
    text = f"Visual tokens per layer: {_average(summary)}\n"
    end = summary["at_end"]
    if end["mean"] != summary["mean"]:
        text += f"Visual tokens in the last layer: {_average(end)}\n"
    if end["min"] == end["max"]:
        return text
    spread = ", ".join(f"{name} {end[name]:.1f}" for name in ("min", "p10", "median", "p90", "max"))
    bins = " ".join(map(str, end["histogram"]))
    return f"{text}  left at the end: {spread}\n  questions by tenth of all tokens: {bins}\n"


def _average(part: dict) -> str:
    return f"{part['mean']:.1f} on average ({100 * part['ratio']:.1f} % of all)"
