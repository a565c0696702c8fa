"""The second tab: two methods answer the same question about the same image."""

from __future__ import annotations

import asyncio

import gradio as gr

from llava.pruning import DEFAULT_METHOD, Pruner

from .client import Service
from .controls import Controls, question_box
from .examples import number_of
from .failures import Failure
from .insight import insight
from .picker import MethodPicker
from .runs import NEXT, WAITING, Run, said
from .script import waiting


class CompareTab:
    """Layout and events; call inside the layout. One method runs after the other, so that neither
    disturbs the other's times."""

    def __init__(self, service: Service, controls: Controls, methods: gr.State):
        self.service, self.controls, self.methods = service, controls, methods
        self.runs = gr.State(None, time_to_live=4 * 3600)  # of the comparison that is going on
        with gr.Row(elem_classes="pv-ask"):
            self.text = question_box("compare-question", "One question for both methods")
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
            return MethodPicker(side, self.methods, default, f"Method, {side}")

    def _panel(self, side: str) -> gr.HTML:
        with gr.Column(min_width=320):
            return gr.HTML(WAITING, elem_id=f"{side}-panel", elem_classes="pv-html")

    def connect(self, concurrency: int) -> None:
        """Wires the events; `concurrency` answers are written at a time."""
        inputs = self.controls.inputs | {self.methods, self.text}
        inputs = inputs.union(*(picker.inputs for picker in self.pickers))
        outputs = {*self.panels, self.run, self.stop, self.runs}
        quick = dict(concurrency_limit=None, show_progress="hidden")
        asked, seen = [self.run.click, self.text.submit], [self.text, self.controls.image]
        gr.on(asked, None, [*seen, *self.panels], self.panels, js=waiting(NEXT), **quick)
        gr.on(
            asked,
            self.compare,
            inputs,
            outputs,
            concurrency_limit=concurrency,
            concurrency_id="answers",
            show_progress="hidden",
        )
        self.stop.click(self.stopped, {self.runs}, outputs, **quick)

    async def compare(self, values: dict):
        """Asks both methods, left then right."""
        text, image = (values[self.text] or "").strip(), values[self.controls.image]
        if image is None or not text:
            gr.Warning(Failure("no_image" if image is None else "no_question").sentence)
            yield {self.panels[0]: WAITING}
            return
        runs = [Run(), Run()]
        yield {
            self.run: gr.update(visible=False),
            self.stop: gr.update(visible=True),
            self.panels[0]: NEXT,
            self.panels[1]: NEXT,
            self.runs: runs,
        }
        example = await asyncio.to_thread(number_of, image, self.controls.samples)
        sides = list(zip(runs, self.panels, strict=True))
        for (run, panel), picker in zip(sides, self.pickers, strict=True):
            async for _ in run.ask(self.service, self._settings(picker, values), text, image):
                yield {panel: said(run.method, run.answer())}
            if run.left:
                break
            measuring = self._measures(values)
            yield {panel: await asyncio.to_thread(_panel, run, example, None, measuring)}
        done = [(run, panel) for run, panel in sides if run.report]
        dense = await self._dense([run for run, _ in done], values)
        if runs[0].left:  # gradio sends the last update again when this is over
            yield {self.panels[0]: gr.skip()}
            return
        yield {
            panel: await asyncio.to_thread(_panel, run, example, dense, False)
            for run, panel in done
        }
        yield self._idle()

    def _settings(self, picker: MethodPicker, values: dict):
        def settings():
            known = values[self.methods]
            pruning = picker.request(known["methods"], values)
            return self.controls.settings(values, pruning, known.get("conv_mode"))

        return settings

    def _measures(self, values: dict) -> bool:
        """Whether the time without pruning will be known at the end."""
        plain = [values[picker.method] == Pruner.name for picker in self.pickers]
        return any(plain) or bool(values[self.controls.dense])

    async def _dense(self, runs: list[Run], values: dict) -> float | None:
        """Seconds of the prefill without pruning: of the run that had none, or measured."""
        for run in runs:
            if run.report.method == Pruner.name:
                return run.report.prefill_seconds
        if not runs or not values[self.controls.dense]:
            return None
        return await runs[0].dense_seconds(self.service)

    def stopped(self, values: dict) -> dict:
        """Stop: what was written so far stays."""
        cut = {}
        for run, panel in zip(values[self.runs] or [], self.panels, strict=False):
            run.stop()
            if run.stopped:
                cut[panel] = said(run.method, run.answer())
        return {**self._idle(), **cut}

    def _idle(self) -> dict:
        shown = {self.run: gr.update(visible=True), self.stop: gr.update(visible=False)}
        return {**shown, self.runs: None}


def _panel(run: Run, example: int | None, dense: float | None, measuring: bool) -> str:
    """All about one side, once its answer is complete."""
    answer = said(run.method, run.answer())
    if run.problem:
        return answer
    asked = run.asked(example)
    return answer + insight(run.images, run.report, dense, measuring, asked)
