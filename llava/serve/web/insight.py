"""The panel below an answer: figures beside the dense ones, tokens per layer, kept patches."""

from __future__ import annotations

import html
import secrets

from PIL import Image

from .pictures import IMPORTANCE, data_uri, stages
from .report import Report

EMPTY = "<p class='pv-empty'>Ask something about an image: here you will see which of its patches "
EMPTY += "the model kept, and what that saved.</p>"


def insight(
    images: list[Image.Image], report: Report | None, dense_seconds: float | None = None
) -> str:
    """The panel as HTML without scripts; pictures are part of it, nothing is stored.

    dense_seconds: measured time of the same prefill without pruning, None when it was not measured
    """
    if report is None:
        return "<p class='pv-empty'>This answer came without a pruning report.</p>"
    parts = [_cards(report, dense_seconds), _views(images, report), _layers(report)]
    return f"<div class='pv'>{''.join(parts)}</div>"


def _cards(report: Report, dense_seconds: float | None) -> str:
    tokens = _number(report.mean_tokens)
    cards = [
        _card(
            "Visual tokens",
            tokens,
            f"{report.dense_tokens}",
            report.mean_tokens,
            report.dense_tokens,
        ),
        _card(
            "Prefill",
            _seconds(report.prefill_seconds),
            dense_seconds and _seconds(dense_seconds),
            report.prefill_seconds,
            dense_seconds,
        ),
        _card(
            "KV cache",
            _bytes(report.kv_bytes),
            _bytes(report.dense_kv_bytes),
            report.kv_bytes,
            report.dense_kv_bytes,
        ),
    ]
    return f"<div class='pv-cards'>{''.join(cards)}</div>"


def _card(title: str, value: str, dense: str | None, ours: float, theirs: float | None) -> str:
    beside = f"dense {dense}" if dense else "dense not measured"
    change = ""
    if theirs and round(ours / theirs, 3) != 1:
        percent = f"{100 * (ours / theirs - 1):+.0f} %".replace("-", "\N{MINUS SIGN}")
        change = f"<span class='pv-change'>{percent}</span>"
    return (
        f"<div class='pv-card'><div class='pv-title'>{title}</div>"
        f"<div class='pv-value'>{value}</div><div class='pv-dense'>{beside} {change}</div></div>"
    )


def _layers(report: Report) -> str:
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
        f"{_number(report.mean_tokens)} on average</div><div class='pv-bars'>{bars}</div>"
        f"<div class='pv-axis'><span>layer 0</span><span>layer {last}</span></div>"
        f"<div class='pv-dense'>{spans}</div></div>"
    )


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


def _views(images: list[Image.Image], report: Report) -> str:
    """One picture per stage, switched without a script: a radio button before every pane."""
    views = stages(images, report)
    group = f"pv{secrets.token_hex(4)}"
    first = max(n for n, (title, _) in enumerate(views) if title != IMPORTANCE)
    choices, panes = [], []
    for number, (title, panels) in enumerate(views):
        checked = " checked" if number == first else ""
        name = html.escape(title)
        pictures = "".join(
            f"<img src='{data_uri(panel)}' alt='{name}: kept patches bright'>" for panel in panels
        )
        choices.append(
            f"<input type='radio' name='{group}' id='{group}-{number}'{checked}>"
            f"<label for='{group}-{number}'>{name}</label>"
        )
        panes.append(f"<div class='pv-pane'>{pictures}</div>")
    shown = f"<div class='pv-panes'>{''.join(panes)}</div>"
    return f"<div class='pv-views'>{''.join(choices)}{shown}{_note(report)}</div>"


def _note(report: Report) -> str:
    merged = sum(image.merged for image in report.images)
    if not merged:
        return ""
    return (
        f"<p class='pv-dense'>{merged} of the tokens are merged from several patches or mark a "
        "line end, and have no place of their own.</p>"
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _bytes(size: int) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
