"""The third tab: one method answers the same question with several budgets."""

from __future__ import annotations

import asyncio

import gradio as gr

from llava.pruning import DEFAULT_METHOD, Pruner

from .budgets import MOST, proposed, read_budgets
from .client import Service
from .controls import Controls, question_box
from .examples import number_of
from .failures import Failure
from .methods import BUDGET, SHARE, pruning_request
from .picker import MethodPicker
from .runs import NEXT, WAITING, Run
from .script import waiting
from .sweep_view import Step, sweep_html

UPDATE_SECONDS = 0.2  # shortest time between two updates while an answer is written


class SweepTab:
    """Layout and events; call inside the layout. The budgets are asked one after the other, behind
    a run without pruning whose answer and time they are compared with."""

    def __init__(self, service: Service, controls: Controls, methods: gr.State):
        self.service, self.controls, self.methods = service, controls, methods
        self.steps = gr.State(None, time_to_live=4 * 3600)  # of the sweep that is going on
        with gr.Row(elem_classes="pv-ask"):
            self.text = question_box("sweep-question", "One question for all budgets")
            self.run = gr.Button("Sweep", variant="primary", scale=1, min_width=90, elem_id="sweep")
            self.stop = gr.Button(
                "Stop", variant="stop", scale=1, min_width=90, visible=False, elem_id="sweep-stop"
            )
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                self.picker = MethodPicker("sweep", methods, DEFAULT_METHOD, with_budget=False)
            with gr.Column(min_width=320):
                self.budgets = gr.Textbox(
                    proposed(576),
                    label="Budgets",
                    info=f"Up to {MOST} numbers of tokens per image, or shares such as 11%",
                    max_length=200,
                    elem_id="sweep-budgets",
                )
        self.panel = gr.HTML(WAITING, elem_id="sweep-panel", elem_classes="pv-html")

    def connect(self, concurrency: int) -> None:
        """Wires the events; `concurrency` answers are written at a time."""
        inputs = self.controls.inputs | {self.methods, self.text, self.budgets}
        outputs = {self.panel, self.run, self.stop, self.steps}
        quick = dict(concurrency_limit=None, show_progress="hidden")
        asked = [self.run.click, self.text.submit, self.budgets.submit]
        seen = [self.text, self.controls.image, self.panel]
        gr.on(asked, None, seen, [self.panel], js=waiting(NEXT), **quick)
        gr.on(
            asked,
            self.sweep,
            inputs | self.picker.inputs,
            outputs,
            concurrency_limit=concurrency,
            concurrency_id="answers",
            show_progress="hidden",
        )
        self.stop.click(self.stopped, {self.steps}, outputs, **quick)

    async def sweep(self, values: dict):
        """Asks without pruning, then with every budget."""
        text, image = (values[self.text] or "").strip(), values[self.controls.image]
        try:
            if image is None or not text:
                raise Failure("no_image" if image is None else "no_question")
            requests = self._requests(values)
        except Failure as failure:
            gr.Warning(failure.sentence)
            yield {self.panel: WAITING}
            return
        steps = [Step(Run()), *(Step(Run(), *budget) for budget in requests)]
        example = await asyncio.to_thread(number_of, image, self.controls.samples)
        yield {
            self.run: gr.update(visible=False),
            self.stop: gr.update(visible=True),
            self.panel: sweep_html(steps, example),
            self.steps: steps,
        }
        plain = {"method": Pruner.name, BUDGET: None, "options": {}}
        known, clock, shown = values[self.methods], asyncio.get_running_loop().time, 0.0
        for step, pruning in zip(steps, [plain, *requests.values()], strict=True):
            settings = self.controls.settings(values, pruning, known.get("conv_mode"))
            async for _ in step.run.ask(self.service, lambda own=settings: own, text, image):
                if clock() - shown >= UPDATE_SECONDS:
                    shown = clock()
                    yield {self.panel: sweep_html(steps, example)}
            if step.run.left:  # gradio sends the last update again when this is over
                yield {self.panel: gr.skip()}
                return
            if step.run.report:
                await asyncio.to_thread(step.draw, step.run.images)
            yield {self.panel: sweep_html(steps, example)}
        yield self._idle()

    def _requests(self, values: dict) -> dict[tuple[float, bool], dict]:
        """Budget -> the "pruning" field of its request. Raises Failure."""
        methods, name = values[self.methods]["methods"], values[self.picker.method]
        method = methods.get(name)
        if method is None:
            raise Failure("no_method")
        if BUDGET not in method.options:
            raise Failure("bad_budgets", f"The method {name} has no budget; choose another one.")
        budgets = read_budgets(values[self.budgets] or "")
        if any(share for _, share in budgets) and SHARE not in method.options:
            raise Failure("bad_budgets", f"The method {name} takes numbers of tokens, no shares.")
        texts = [values[box] or "" for box in self.picker.boxes]
        return {
            (value, share): pruning_request(methods, name, value, texts, shares=share)
            for value, share in budgets
        }

    def stopped(self, values: dict) -> dict:
        """Stop: what is there stays."""
        steps = values[self.steps] or []
        for step in steps:
            step.run.stop()
        shown = {self.panel: sweep_html(steps, None)} if steps else {}
        return {**self._idle(), **shown}

    def _idle(self) -> dict:
        shown = {self.run: gr.update(visible=True), self.stop: gr.update(visible=False)}
        return {**shown, self.steps: None}
