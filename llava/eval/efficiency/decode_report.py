"""What is reported about the speed of decoding: rates, the cost model of guessing, the table."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass

from llava.eval import markdown
from llava.eval.efficiency.decode_run import COMPILED, Variant
from llava.eval.efficiency.measure import DENSE
from llava.pruning.drafter import Drafter


@dataclass
class Row:
    """One line of the report.

    first_ms:        until the first token or, when guesses come with it, tokens
    decode_rate:     tokens per second after that
    total_rate:      tokens per second of the whole call
    speed_up:        of `decode_rate` over the dense model on the same questions
    step_speed_up:   of `decode_rate` over the same loop without guesses
    predicted:       what the cost model says `step_speed_up` should be
    of_passes:       what it would be if only the passes of the decoder and the drafter took time
    accepted, drafted: guesses per step; of a tree `drafted` counts levels
    acceptance:      accepted guesses per guess
    same_answers:    share of answers equal to those of the method one token at a time, in percent
    compiled_speed_up: of `decode_rate` over the same way before it was compiled
    start_up:        seconds that the first call of a compiled way took longer than a later one
    """

    name: str
    first_ms: float
    decode_rate: float
    total_rate: float
    speed_up: float
    step_speed_up: float | None = None
    predicted: float | None = None
    of_passes: float | None = None
    accepted: float | None = None
    drafted: float | None = None
    acceptance: float | None = None
    same_answers: float | None = None
    compiled_speed_up: float | None = None
    start_up: float | None = None


def cost_model(drafter: Drafter, model, accepted: float, drafted: float) -> float:
    """Speed-up over one token at a time, in decoder layers run on one row.

    A token costs L + h, with L layers and a head that costs h of them; a step with g guesses, or
    with a tree of g levels, g (K + T + h) + L + h and gives 1 + accepted tokens (arXiv 2503.14075,
    with the drafter's layers on the last guess of a step put off). Assumes that a layer costs on
    the rows of a step what it costs on one, as on GPUs, and for all tokens of the image, which the
    drafter reads, what it costs for those that are kept; on a CPU both make a step dearer than
    this, a tree most of all.
    """
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    head, depth = model.lm_head.weight.numel() / layer, len(model.model.layers)
    draft = drafter.shared_layers + len(drafter.layers) + head
    return (depth + head) * (1 + accepted) / (drafted * draft + depth + head)


def rows_of(variants: list[Variant], model, same_answers: bool = True) -> list[Row]:
    """The report, the dense model first.

    same_answers: compares answers; False where chance decides about guesses
    """
    rates = {v.name: [clock.decode_rate for clock in v.clocks] for v in variants}
    by_name, rows = {v.name: v for v in variants}, []
    for variant in variants:
        row = Row(
            variant.name,
            1000 * statistics.median(clock.first_seconds for clock in variant.clocks),
            _median(rates[variant.name], variant.name),
            statistics.median(c.tokens / c.arrivals[-1][0] for c in variant.clocks),
            _ratio(rates[variant.name], rates[DENSE]),
        )
        method = variant.name.partition(",")[0]
        if method in by_name and method != variant.name and same_answers:
            plain = by_name[method].answers
            same = sum(a == b for a, b in zip(variant.answers, plain, strict=True))
            row.same_answers = 100 * same / len(plain)
        if variant.logs and variant.guesses:
            steps = [count for log in variant.logs for count in log.acceptable]
            accepted = [a for log in variant.logs for a in log.accepted]
            row.accepted, row.drafted = statistics.mean(accepted), statistics.mean(steps)
            row.acceptance = sum(accepted) / max(1, sum(steps))
            ending = COMPILED if variant.compiled else ""
            still = rates[f"{method}, no guesses{ending}"]
            row.step_speed_up = _ratio(rates[variant.name], still)
            row.of_passes = _ratio(variant.pass_rates, still) if any(variant.pass_rates) else None
            drafter = variant.pruner.decoder.drafter(len(model.model.layers))
            row.predicted = cost_model(drafter, model, row.accepted, row.drafted)
        if variant.compiled:
            exact = rates[variant.name.removesuffix(COMPILED)]
            row.compiled_speed_up = _ratio(rates[variant.name], exact)
            later = statistics.median(clock.arrivals[-1][0] for clock in variant.clocks)
            row.start_up = None if variant.first_call is None else variant.first_call - later
        rows.append(row)
    return rows


def _median(rates: list[float | None], name: str) -> float:
    known = [rate for rate in rates if rate is not None]
    if not known:
        raise ValueError(
            f"{name}: every answer came in one step, which says nothing of how fast tokens follow "
            "each other: allow more of them (--max-new-tokens), or fewer guesses"
        )
    return statistics.median(known)


def _ratio(ours: list, theirs: list) -> float:
    """Median over the questions of how many times as fast."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return statistics.median(a / b for a, b in pairs)


def table(rows: list[Row]) -> str:
    """The report as a Markdown table."""
    lines = [list(map(_cell, asdict(row).values())) for row in rows]
    return markdown.table(list(asdict(rows[0])), lines)


def page(command: str, about: dict, rows: list[Row]) -> str:
    """What stands between the marks of a page: the command, what was measured, and the rows."""
    facts = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in about.items())
    head = ["way", "first tokens, ms", "tokens per second", "times dense", "times no guesses"]
    head += ["predicted", "passes alone", "accepted of guessed per step", "same answers, %"]
    head += ["compiled over as it is", "start-up, s"]
    lines = []
    for row in rows:
        rates = row.speed_up, row.step_speed_up, row.predicted, row.of_passes
        taken = None if row.drafted is None else f"{row.accepted:.2f} of {row.drafted:.2f}"
        same = None if row.same_answers is None else f"{row.same_answers:.0f}"
        cells = [row.name, f"{row.first_ms:.0f}", f"{row.decode_rate:.0f}", *rates, taken, same]
        lines.append([_cell(cell) for cell in [*cells, row.compiled_speed_up, row.start_up]])
    return f"`{command}`\n\n{facts}.\n\n{markdown.table(head, lines, 'lr')}\n"


def _cell(value: str | float | None) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.2f}"
