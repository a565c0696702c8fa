"""The page: shared controls on the left, the two tabs on the right."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import gradio as gr
from PIL import Image

from .chat_tab import ChatTab
from .client import Service
from .compare_tab import CompareTab
from .controls import Controls
from .failures import Failure
from .log import ConversationLog
from .methods import offered

logger = logging.getLogger("llava.serve.web")
KEEP_UPLOADS = (300, 4 * 3600)  # seconds between two looks for old uploads, and their largest age

TITLE = """# LLaVA with visual-token pruning
Ask about an image, and see which of its patches the model needed for the answer."""
TERMS = """**Terms of use.** The models behind this page can be wrong and may write offensive or
unsafe text. Do not upload what you may not share. Uploaded images are deleted after four hours;
questions, answers and images are kept longer only where the operator of this page asked for it.

**Licence.** Code under Apache-2.0; every model has a licence of its own."""


@dataclass(frozen=True)
class PageOptions:
    """models: names known at start; reload: ask for them at every visit; embed: no title or terms;
    moderate: ask the moderation service first; concurrency: answers written at a time."""

    models: tuple[str, ...] = ()
    reload: bool = False
    embed: bool = False
    moderate: bool = False
    concurrency: int = 16


class Page:
    """All of the page: `blocks` is what gradio serves."""

    def __init__(self, service: Service, log: ConversationLog, options: PageOptions):
        self.service, self.options = service, options
        with gr.Blocks(
            title="LLaVA: visual-token pruning", analytics_enabled=False, delete_cache=KEEP_UPLOADS
        ) as self.blocks:
            if not options.embed:
                gr.Markdown(TITLE, elem_id="title")
            with gr.Row(equal_height=False):
                with gr.Column(scale=3, min_width=300):
                    self.controls = Controls(list(options.models))
                    self.controls.parameters()
                with gr.Column(scale=10, min_width=320), gr.Tabs():
                    with gr.Tab("Chat", id="chat"):
                        self.chat = ChatTab(service, self.controls, log, options.moderate)
                    with gr.Tab("Compare two methods", id="compare"):
                        self.compare = CompareTab(service, self.controls, self.chat.methods)
            if not options.embed:
                gr.Markdown(TERMS, elem_id="terms")
            self._connect()

    @property
    def pickers(self) -> list:
        return [self.chat.picker, *self.compare.pickers]

    def _connect(self) -> None:
        offers = [output for picker in self.pickers for output in picker.outputs]
        chosen = {self.controls.model, *(picker.method for picker in self.pickers)}
        quick = dict(show_progress="hidden", concurrency_limit=None)
        loaded = self.blocks.load(self.visit, None, self.controls.model, **quick)
        loaded.then(self.offer, chosen, {self.chat.methods, *offers}, **quick)
        self.controls.model.input(self.offer, chosen, {self.chat.methods, *offers}, **quick)
        for picker in self.pickers:
            picker.method.input(
                self._chooser(picker), {picker.method, self.chat.methods}, picker.outputs, **quick
            )
            picker.then.input(
                self._follower(picker),
                {picker.method, picker.then, picker.budget, picker.shares, self.chat.methods},
                [picker.then_budget, picker.accordion, *picker.boxes],
                **quick,
            )
            picker.shares.input(
                self._measurer(picker),
                {picker.method, picker.shares, self.chat.methods},
                [picker.budget, picker.then, picker.then_budget],
                **quick,
            )
        if self.controls.samples:
            places = [self.controls.image, self.chat.text, self.compare.text]
            self.controls.examples.click(self.example, self.controls.examples, places, **quick)
        self.chat.connect(self.options.concurrency)
        self.compare.connect(self.options.concurrency)

    async def visit(self, request: gr.Request):
        """The model menu for a new visitor; `?model=NAME` in the address chooses one."""
        models = list(self.options.models)
        if self.options.reload or not models:
            try:
                models = await self.service.models()
            except Failure as failure:
                gr.Warning(failure.sentence)
                return gr.update(choices=[], value=None)
        wanted = request.query_params.get("model")
        chosen = wanted if wanted in models else next(iter(models), None)
        if not models:
            gr.Warning(Failure("no_model").sentence)
        return gr.update(choices=models, value=chosen)

    async def offer(self, values: dict):
        """The methods of the chosen model's worker, for all three menus."""
        status, model = {}, values[self.controls.model]
        if model:
            try:
                status = await self.service.status(model)
            except Failure as failure:
                gr.Warning(failure.sentence)
        methods, dense = offered(status), status.get("num_patches")
        own_grids = "num_patches" in status and dense is None
        known = {"methods": methods, "dense": dense, "own_grids": own_grids}
        known["conv_mode"] = status.get("conv_mode")
        updates = {self.chat.methods: known}
        # What the worker was started with comes first, where the visitor has chosen nothing yet.
        default = (status.get("default_pruning") or {}).get("method")
        started = default if default != "none" else None
        for picker in self.pickers:
            chosen = values[picker.method] or (picker.default != "none" and started)
            updates |= picker.offer(methods, chosen or None, dense, own_grids)
        return updates

    def _chooser(self, picker):
        def choose(values: dict):
            known = values[self.chat.methods]
            place = values[picker.method], known["dense"], known["own_grids"]
            return picker.choose(known["methods"], *place)

        return choose

    def _follower(self, picker):
        def follow(values: dict):
            known = values[self.chat.methods]["methods"]
            name, then = values[picker.method], values[picker.then]
            return picker.follow(known, name, then, values[picker.budget], values[picker.shares])

        return follow

    def _measurer(self, picker):
        def measure(values: dict):
            known, shares = values[self.chat.methods], bool(values[picker.shares])
            place = known["methods"], values[picker.method], known["dense"], shares
            return {
                picker.budget: picker.measured(*place),
                picker.then: gr.update(value=""),
                picker.then_budget: gr.update(visible=False),
            }

        return measure

    def example(self, number: int):
        """Image and question of an example, the question for both tabs."""
        path, question = self.controls.samples[number]
        return Image.open(path), question, question
