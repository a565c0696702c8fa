"""The second tab: two methods answer the same question about the same image."""

from __future__ import annotations

import asyncio
import html
import logging

import gradio as gr

from llava.log_output import error_places
from llava.pruning import DEFAULT_METHOD, Pruner

from ..errors import new_request_id
from . import asking
from .client import Service
from .controls import Controls
from .failures import Failure
from .insight import insight
from .picker import MethodPicker

logger = logging.getLogger("llava.serve.web")
WAITING = "<p class='pv-empty'>The answer appears here.</p>"
NEXT = "<p class='pv-empty'>Waiting …</p>"


class CompareTab:
    """Layout and events; call inside the layout. One method runs after the other, so that neither
    disturbs the other's times."""

    def __init__(self, service: Service, controls: Controls, methods: gr.State):
        self.service, self.controls, self.methods = service, controls, methods
        self.runs = gr.State(None, time_to_live=4 * 3600)  # of the comparison that is going on
        with gr.Row(elem_classes="pv-ask"):
            self.text = gr.Textbox(
                show_label=False,
                placeholder="One question for both methods",
                scale=8,
                lines=1,
                max_lines=4,
                max_length=4000,
                elem_id="compare-question",
                container=False,
                min_width=120,
            )
            self.run = gr.Button(
                "Compare", variant="primary", scale=1, min_width=90, elem_id="compare"
            )
            self.stop = gr.Button(
                "Stop", variant="stop", scale=1, min_width=90, visible=False, elem_id="compare-stop"
            )
        sides = (("left", Pruner.name), ("right", DEFAULT_METHOD))
        with gr.Row(equal_height=False):
            self.pickers = [self._picker(side, default) for side, default in sides]
        with gr.Row(equal_height=False):
            self.panels = [self._panel(side) for side, _ in sides]

    def _picker(self, side: str, default: str) -> MethodPicker:
        with gr.Column(min_width=320):
            return MethodPicker(side, default, f"Method, {side}")

    def _panel(self, side: str) -> gr.HTML:
        with gr.Column(min_width=320):
            return gr.HTML(WAITING, elem_id=f"{side}-panel", padding=False)

    def connect(self, concurrency: int) -> None:
        """Wires the events; `concurrency` answers are written at a time."""
        inputs = self.controls.inputs | {self.methods, self.text}
        inputs = inputs.union(*(picker.inputs for picker in self.pickers))
        outputs = {*self.panels, self.run, self.stop, self.runs}
        running = gr.on(
            [self.run.click, self.text.submit],
            self.compare,
            inputs,
            outputs,
            concurrency_limit=concurrency,
            concurrency_id="answers",
            show_progress="hidden",
        )
        self.stop.click(
            self.stopped,
            {self.runs},
            outputs,
            cancels=[running],
            concurrency_limit=None,
            show_progress="hidden",
        )

    async def compare(self, values: dict):
        """Asks both methods, left then right."""
        text, image = (values[self.text] or "").strip(), values[self.controls.image]
        if image is None or not text:
            failure = Failure("no_image" if image is None else "no_question")
            gr.Warning(failure.sentence)
            yield {self.panels[0]: WAITING}
            return
        runs = list(map(_Run, self.pickers, self.panels))
        yield {
            self.run: gr.update(visible=False),
            self.stop: gr.update(visible=True),
            self.panels[0]: NEXT,
            self.panels[1]: NEXT,
            self.runs: runs,
        }
        for run in runs:
            async for shown in self._one(run, values, text, image):
                yield {run.panel: shown}
        dense = await self._dense(runs, values)
        if dense is not None:
            done = [run for run in runs if run.report]
            yield {run.panel: await asyncio.to_thread(run.panel_html, dense) for run in done}
        yield self._idle()

    async def _one(self, run: _Run, values: dict, text: str, image):
        """The growing panel of one method."""
        number = new_request_id()
        try:
            known = values[self.methods]
            pruning = run.picker.request(known["methods"], values)
            run.method = pruning["method"] if pruning else ""
            run.settings = self.controls.settings(values, pruning, known.get("conv_mode"))
            run.conversation = asking.new_conversation(run.settings)
            asking.add_question(run.conversation, text, image, run.settings.mode)
            async for answer in asking.ask(self.service, run.conversation, run.settings, number):
                run.text, run.report = answer.text, answer.report
                yield run.said(answer.text + "▌")
            shown = await asyncio.to_thread(run.panel_html, None)
            run.ended = True
            yield shown
        except Failure as failure:
            logger.warning("request %s: %s", number, failure.cause)
            run.ended = True
            yield run.said(f"⚠️ {failure.text(number)}")
        except Exception as error:
            logger.error("request %s: %s", number, error_places(error))
            run.ended = True
            yield run.said(f"⚠️ {Failure('page_error').text(number)}")

    async def _dense(self, runs: list[_Run], values: dict) -> float | None:
        """Seconds of the prefill without pruning: of the run that had none, or measured."""
        reports = [run.report for run in runs if run.report]
        for report in reports:
            if report.method == "none":
                return report.prefill_seconds
        if not reports or not values[self.controls.dense]:
            return None
        run = next(run for run in runs if run.report)
        return await asking.dense_seconds(
            self.service, run.conversation, run.settings, new_request_id()
        )

    def stopped(self, values: dict) -> dict:
        """Stop: what was written so far stays."""
        cut = [run for run in values[self.runs] or [] if not run.ended]
        return {**self._idle(), **{run.panel: run.said(f"{run.text} (stopped)") for run in cut}}

    def _idle(self) -> dict:
        shown = {self.run: gr.update(visible=True), self.stop: gr.update(visible=False)}
        return {**shown, self.runs: None}


class _Run:
    """One side of a comparison. ended: its panel is complete."""

    def __init__(self, picker: MethodPicker, panel: gr.HTML):
        self.picker, self.panel = picker, panel
        self.method, self.text, self.report = "", "", None
        self.settings = self.conversation = None
        self.ended = False

    def said(self, text: str) -> str:
        title = f"<div class='pv-title pv-method'>{html.escape(self.method)}</div>"
        return f"<div class='pv-answer'>{title}{html.escape(text.strip())}</div>"

    def panel_html(self, dense: float | None) -> str:
        images = self.conversation.get_images(return_pil=True)
        return self.said(self.text or "(no text)") + insight(images, self.report, dense)
