"""The panel below an answer: figures beside the dense ones, tokens per layer, kept patches."""

from __future__ import annotations

import html
import secrets

from PIL import Image

from .exports import Asked, exports
from .figures import cards, layers
from .pictures import IMPORTANCE, View, data_uri, stages
from .report import Report

EMPTY = "<p class='pv-empty'>Ask something about an image: here you will see which of its patches "
EMPTY += "the method kept, and what that saved.</p>"
NO_IMAGE = "<p class='pv-empty'>This question was asked without an image, so there was nothing to "
NO_IMAGE += "prune. Choose an example, or an image of your own, and ask again.</p>"


def insight(
    images: list[Image.Image],
    report: Report | None,
    dense_seconds: float | None = None,
    measuring: bool = False,
    asked: Asked | None = None,
) -> str:
    """The panel as HTML; pictures are part of it, nothing is stored.

    dense_seconds: measured time of the same prefill without pruning, None when it was not measured
    measuring:     it is measured now
    asked:         what the report belongs to; with it the panel has a link and downloads
    """
    if report is None:
        return "<p class='pv-empty'>This answer came without a pruning report.</p>"
    taken = exports(asked, report, dense_seconds) if asked else ""
    parts = [cards(report, dense_seconds, measuring), _views(images, report), taken, layers(report)]
    return f"<div class='pv'>{''.join(parts)}</div>"


def shown_first(views: list[View]) -> int:
    """Number of the last stage that kept patches: some methods end with none."""
    stays = [n for n, view in enumerate(views) if view.title != IMPORTANCE and any(view.kept)]
    return max(stays, default=0)


def _views(images: list[Image.Image], report: Report) -> str:
    """One picture per stage, switched without a script: a radio button before every pane."""
    views = stages(images, report)
    group = f"pv{secrets.token_hex(4)}"
    first = shown_first(views)
    choices, panes = [], []
    for number, view in enumerate(views):
        checked = " checked" if number == first else ""
        name = html.escape(view.title)
        pictures = "".join(
            f"<img src='{data_uri(panel)}' alt='{html.escape(view.alt)}'>" for panel in view.panels
        )
        choices.append(
            f"<input type='radio' name='{group}' id='{group}-{number}'{checked}>"
            f"<label for='{group}-{number}'>{name}{_count(view)}</label>"
        )
        panes.append(f"<div class='pv-pane'>{pictures}</div>")
    shown = f"<div class='pv-panes'>{''.join(panes)}</div>"
    return (
        "<div class='pv-views' role='group' aria-label='Patches that were kept'>"
        f"{''.join(choices)}{shown}{_note(report)}</div>"
    )


def _count(view: View) -> str:
    return f" <small>{sum(view.kept)}</small>" if view.kept else ""


def _note(report: Report) -> str:
    merged = sum(image.merged for image in report.images)
    if not merged:
        return ""
    return (
        f"<p class='pv-dense'>{merged} of the tokens are merged from several patches or mark a "
        "line end, and have no place of their own.</p>"
    )
