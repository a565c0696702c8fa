"""The second tab: two methods answer the same question about the same image."""

from __future__ import annotations

import html
import logging

import gradio as gr

from ..errors import new_request_id
from . import asking
from .client import Service
from .controls import Controls
from .failures import Failure
from .insight import insight
from .picker import MethodPicker

logger = logging.getLogger("llava.serve.web")
WAITING = "<p class='pv-empty'>The answer appears here.</p>"
NEXT = "<p class='pv-empty'>Waiting for the other method …</p>"


class CompareTab:
    """Layout and events; call inside the layout. One method runs after the other, so that neither
    disturbs the other's times."""

    def __init__(self, service: Service, controls: Controls, methods: gr.State):
        self.service, self.controls, self.methods = service, controls, methods
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
        self.pickers, self.panels = [], []
        with gr.Row(equal_height=False):
            for side, default in (("left", "none"), ("right", "vispruner")):
                with gr.Column(min_width=320):
                    with gr.Group(elem_classes="pv-picker"):
                        self.pickers.append(MethodPicker(side, default, f"Method, {side}"))
                    self.panels.append(gr.HTML(WAITING, elem_id=f"{side}-panel", padding=False))

    def connect(self, concurrency: int) -> None:
        """Wires the events; `concurrency` answers are written at a time."""
        inputs = self.controls.inputs | {self.methods, self.text}
        inputs = inputs.union(*(picker.inputs for picker in self.pickers))
        outputs = {*self.panels, self.run, self.stop}
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
            self._idle,
            None,
            {self.run, self.stop},
            cancels=[running],
            queue=False,
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
        yield {
            self.run: gr.update(visible=False),
            self.stop: gr.update(visible=True),
            self.panels[0]: _said("…"),
            self.panels[1]: NEXT,
        }
        for picker, panel in zip(self.pickers, self.panels, strict=True):
            async for shown in self._one(picker, values, text, image):
                yield {panel: shown}
        yield self._idle()

    async def _one(self, picker: MethodPicker, values: dict, text: str, image):
        """The growing panel of one method."""
        number = new_request_id()
        try:
            pruning = picker.request(values[self.methods]["methods"], values)
            settings = self.controls.settings(values, pruning)
            conversation = asking.new_conversation(settings)
            asking.add_question(conversation, text, image, settings.mode)
            async for answer in asking.ask(self.service, conversation, settings, number):
                yield _said(answer.text + "▌")
            images = conversation.get_images(return_pil=True)
            yield _said(answer.text or "(no text)") + insight(images, answer.report)
        except Failure as failure:
            logger.warning("request %s: %s", number, failure.cause)
            yield _said(f"⚠️ {failure.text(number)}")
        except Exception as error:
            logger.exception("request %s: %s", number, type(error).__name__)
            yield _said(f"⚠️ {Failure('page_error').text(number)}")

    def _idle(self) -> dict:
        return {self.run: gr.update(visible=True), self.stop: gr.update(visible=False)}


def _said(text: str) -> str:
    return f"<div class='pv-answer'>{html.escape(text)}</div>"
