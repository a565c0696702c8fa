"""The figures of a report as HTML: cards beside the unpruned values, and tokens per layer."""

from __future__ import annotations

from .report import Report

SPANS = 3  # runs of layers that fit into a card
MINUS = "\N{MINUS SIGN}"
TERMS = "<p class='pv-dense'>Dense: the same with all visual tokens. Prefill: from image and "
TERMS += "question to the first token of the answer. KV cache: memory that the prompt takes.</p>"


def cards(report: Report, dense_seconds: float | None, measuring: bool = False) -> str:
    """Three cards and what their words mean; for `dense_seconds` and `measuring` see `insight`."""
    uneven = len(set(report.tokens_per_layer)) > 1
    shown = [
        _card(
            "Visual tokens, average" if uneven else "Visual tokens",
            number_text(report.mean_tokens),
            f"dense {report.dense_tokens}",
            change(report.mean_tokens, report.dense_tokens),
            _steps(report.tokens_per_layer) if uneven else "",
        ),
        _card(
            "Prefill",
            seconds_text(report.prefill_seconds),
            _dense_time(dense_seconds, measuring),
            change(report.prefill_seconds, dense_seconds),
        ),
        _card(
            "KV cache",
            bytes_text(report.kv_bytes),
            f"dense {bytes_text(report.dense_kv_bytes)}",
            change(report.kv_bytes, report.dense_kv_bytes),
        ),
    ]
    return f"<div class='pv-cards'>{''.join(shown)}</div>{TERMS}"


def layers(report: Report) -> str:
    """A bar for every decoder layer."""
    most = max([report.dense_tokens, *report.tokens_per_layer, 1])
    bars = "".join(
        f"<div class='pv-bar' title='layer {layer}: {tokens} of {report.dense_tokens} tokens'>"
        f"<i style='height:{100 * tokens / most:.1f}%'></i></div>"
        for layer, tokens in enumerate(report.tokens_per_layer)
    )
    last = len(report.tokens_per_layer) - 1
    spans = ", ".join(_spans(report.tokens_per_layer))
    return (
        "<div class='pv-layers'><div class='pv-title'>Visual tokens entering each decoder layer, "
        f"{number_text(report.mean_tokens)} on average</div>"
        f"<div class='pv-bars' aria-hidden='true'>{bars}</div>"
        f"<div class='pv-axis'><span>layer 0</span><span>layer {last}</span></div>"
        f"<div class='pv-dense'>{spans}</div></div>"
    )


def change(ours: float, theirs: float | None) -> str:
    """By how much a value differs, "-75 %"; "" where it does not, or the other is unknown."""
    if not theirs or round(ours / theirs, 3) == 1:
        return ""
    return f"{100 * (ours / theirs - 1):+.0f} %".replace("-", MINUS)


def number_text(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def seconds_text(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def bytes_text(size: int) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def _card(title: str, value: str, dense: str, changed: str, steps: str = "") -> str:
    changed = f" <span class='pv-change'>{changed}</span>" if changed else ""
    steps = f"<div class='pv-dense'>{steps}</div>" if steps else ""
    return (
        f"<div class='pv-card'><div class='pv-title'>{title}</div>"
        f"<div class='pv-value'>{value}</div><div class='pv-dense'>{dense}{changed}</div>"
        f"{steps}</div>"
    )


def _dense_time(seconds: float | None, measuring: bool) -> str:
    if seconds is not None:
        return f"dense {seconds_text(seconds)}"
    return "dense: measuring …" if measuring else "dense not measured"


def _steps(tokens: list[int]) -> str:
    """How an average comes about."""
    spans = _spans(tokens)
    return ", ".join(spans) if len(spans) <= SPANS else f"from {max(tokens)} to {min(tokens)}"


def _spans(tokens: list[int]) -> list[str]:
    """ "layers 0-1: 576" for every run of layers with the same count."""
    spans, start = [], 0
    for layer in range(1, len(tokens) + 1):
        if layer == len(tokens) or tokens[layer] != tokens[start]:
            last = layer - 1
            name = f"layer {start}" if last == start else f"layers {start}\N{EN DASH}{last}"
            spans.append(f"{name}: {tokens[start]}")
            start = layer
    return spans
