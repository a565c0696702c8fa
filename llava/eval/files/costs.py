"""What answers cost, as their lines record it, summed up over a file."""

from __future__ import annotations

from statistics import mean

#: keys in the `metadata` of an answer line: its share of the time of its batch, tokens of the
#: answer, the most GPU memory its batch held (MiB), and operations of the decoder
MILLISECONDS, NEW_TOKENS, PEAK, FLOPS = "milliseconds", "new_tokens", "peak_mib", "flops"
#: keys of the last: with and without the method, for the prompt and for the answer
PREFILL, PREFILL_UNPRUNED = "prefill", "prefill_unpruned"
DECODE, DECODE_UNPRUNED = "decode", "decode_unpruned"


def summarize(answers: list[dict]) -> dict:
    """Returns `call_count`, and where lines record them `avg_time` (ms per answer),
    `avgNumGenTokens`, `peak_mib`, and `flops` with the mean of each of its numbers."""
    metadata = [answer.get("metadata") or {} for answer in answers]
    found: dict = {"call_count": len(answers)}
    for key, name, rule in (
        (MILLISECONDS, "avg_time", mean),
        (NEW_TOKENS, "avgNumGenTokens", mean),
        (PEAK, PEAK, max),
    ):
        if values := [own[key] for own in metadata if key in own]:
            found[name] = rule(values)
    if known := [own[FLOPS] for own in metadata if isinstance(own.get(FLOPS), dict)]:
        keys = (PREFILL, PREFILL_UNPRUNED, DECODE, DECODE_UNPRUNED)
        found[FLOPS] = {key: mean(own[key] for own in known) for key in keys}
    return found
