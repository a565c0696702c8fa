"""What a sweep has found so far as HTML: a card for every budget, and what follows from them."""

from __future__ import annotations

import html
from dataclasses import dataclass

from PIL import Image

from .budgets import budget_text
from .exports import answer_json, download
from .figures import change, number_text, seconds_text
from .insight import shown_first
from .pictures import View, data_uri, stages
from .runs import Run

SIDE = 280  # pixels of a picture


@dataclass
class Step:
    """
    budget:  what was asked for; None: no pruning
    picture: what was kept, once it is known; drawn once
    """

    run: Run
    budget: float | None = None
    share: bool = False
    picture: str = ""

    @property
    def title(self) -> str:
        return "all tokens" if self.budget is None else budget_text(self.budget, self.share)

    def draw(self, images: list[Image.Image]) -> None:
        """Makes the picture from the report."""
        views = stages(images, self.run.report)
        self.picture = _picture(views[shown_first(views)])


def sweep_html(steps: list[Step], example: int | None) -> str:
    """steps: that of all tokens first, then the budgets"""
    longest = max((s.run.report.prefill_seconds for s in steps if s.run.report), default=0) or 1
    cards = "".join(_card(step, steps[0], longest) for step in steps)
    return f"{_finding(steps)}<div class='pv-sweep'>{cards}</div>{_download(steps, example)}"


def smallest_agreeing(steps: list[Step]) -> Step | None:
    """The smallest budget from which on, upwards, all answers are those of all tokens; None where
    the largest has another answer, or one is not complete."""
    if not all(step.run.ended and step.run.report for step in steps):
        return None
    whole, *pruned = steps
    found = None
    for step in sorted(pruned, key=lambda step: -step.run.report.mean_tokens):
        if step.run.text != whole.run.text:
            break
        found = step
    return found


def _finding(steps: list[Step]) -> str:
    if not all(step.run.ended for step in steps):
        return "<p class='pv-finding'>Asking …</p>"
    if any(step.run.problem or step.run.stopped for step in steps):
        return "<p class='pv-finding'>Not all budgets were asked.</p>"
    found = smallest_agreeing(steps)
    if found is None:
        return (
            "<p class='pv-finding'>Not even the largest budget gives the answer of all tokens.</p>"
        )
    return (
        f"<p class='pv-finding'>The answer stays the same down to <b>{found.title}</b> "
        f"({number_text(found.run.report.mean_tokens)} of {found.run.report.dense_tokens} tokens "
        "on average over the layers).</p>"
    )


def _card(step: Step, whole: Step, longest: float) -> str:
    """longest: prefill of the slowest step, in seconds, whose bar is full"""
    run, report = step.run, step.run.report
    if run.settings is None and not run.ended:
        inside = "<p class='pv-dense'>waiting …</p>"
    else:
        inside = f"<div class='pv-said'>{html.escape(run.answer())}</div>"
    figures = ""
    if report is not None:
        dense = whole.run.report and whole.run.report.prefill_seconds
        tokens = number_text(report.mean_tokens)
        figures = (
            f"<div class='pv-dense'>{tokens} tokens on average, prefill "
            f"{seconds_text(report.prefill_seconds)} "
            f"<b>{change(report.prefill_seconds, dense)}</b></div>"
            f"<div class='pv-meter' aria-hidden='true'>"
            f"<i style='width:{100 * report.prefill_seconds / longest:.0f}%'></i></div>"
        )
    other = ""
    complete = run.report is not None and whole.run.report is not None
    if complete and step is not whole:
        same = run.text == whole.run.text
        other = f"<span class='pv-same-{same}'>{'same answer' if same else 'another answer'}</span>"
    head = f"<div class='pv-value'>{step.title} {other}</div>"
    return f"<section class='pv-card'>{head}{inside}{figures}{step.picture}</section>"


def _picture(view: View) -> str:
    alt = html.escape(view.alt)
    return "".join(f"<img src='{data_uri(panel, SIDE)}' alt='{alt}'>" for panel in view.panels)


def _download(steps: list[Step], example: int | None) -> str:
    done = [step for step in steps if step.run.ended and step.run.report]
    if len(done) < len(steps):
        return ""
    answers = [answer_json(step.run.asked(example), step.run.report, None) for step in done]
    dense = done[0].run.report.prefill_seconds
    taken = [{**answer, "dense_prefill_seconds": dense} for answer in answers]
    button = download("Download all reports (JSON)", "sweep.json", taken)
    return f"<div class='pv-takes'>{button}</div>"
