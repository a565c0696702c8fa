"""The page: shared controls on the left, the tabs on the right."""

from __future__ import annotations

from dataclasses import dataclass

import gradio as gr

from .budgets import proposed
from .chat_tab import ChatTab
from .client import Service
from .compare_tab import CompareTab
from .controls import Controls
from .failures import Failure
from .link import Link, read_link
from .log import ConversationLog
from .methods import followers, offered
from .sweep_tab import SweepTab

KEEP_UPLOADS = (300, 4 * 3600)  # seconds between two looks for old uploads, and their largest age

TITLE = """# LLaVA with visual-token pruning
Ask about an image, and see which of its patches a method keeps, and what that saves."""
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
            with gr.Row(equal_height=False, elem_id="page"):
                with gr.Column(scale=3, min_width=300, elem_id="shared"):
                    self.controls = Controls(list(options.models))
                    self.controls.parameters()
                with gr.Column(scale=10, min_width=320, elem_id="tabs"), gr.Tabs():
                    with gr.Tab("Chat", id="chat"):
                        self.chat = ChatTab(service, self.controls, log, options.moderate)
                    known = self.chat.methods
                    with gr.Tab("Compare two methods", id="compare"):
                        self.compare = CompareTab(service, self.controls, known)
                    with gr.Tab("Sweep", id="sweep"):
                        self.sweep = SweepTab(service, self.controls, known)
            if not options.embed:
                gr.Markdown(TERMS, elem_id="terms")
            self._connect()

    @property
    def pickers(self) -> list:
        return [self.chat.picker, *self.compare.pickers, self.sweep.picker]

    @property
    def questions(self) -> list:
        """Boxes for questions, one in every tab."""
        return [self.chat.text, self.compare.text, self.sweep.text]

    def _connect(self) -> None:
        offers = [output for picker in self.pickers for output in picker.outputs]
        offers = {self.chat.methods, self.sweep.budgets, *offers}
        chosen = {self.controls.model, *(picker.method for picker in self.pickers)}
        quick = dict(show_progress="hidden", concurrency_limit=None)
        loaded = self.blocks.load(self.visit, None, self.controls.model, **quick)
        restored = {self.controls.image, *self.questions, *self.chat.picker.outputs}
        loaded.then(self.offer, chosen, offers, **quick).then(
            self.follow_link, {self.chat.methods}, restored, **quick
        )
        self.controls.model.input(self.offer, chosen, offers, **quick)
        for picker in self.pickers:
            picker.connect()
        places = [self.controls.image, *self.questions]
        self.controls.examples.select(self.pressed, None, places, **quick)
        self.chat.connect(self.options.concurrency)
        self.compare.connect(self.options.concurrency)
        self.sweep.connect(self.options.concurrency)

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
        """The methods of the chosen model's worker, for the menus of all tabs."""
        status, model = {}, values[self.controls.model]
        if model:
            try:
                status = await self.service.status(model)
            except Failure as failure:
                gr.Warning(failure.sentence)
        methods, dense = offered(status), status.get("num_patches")
        own_grids = "num_patches" in status and dense is None
        known = {"methods": methods, "dense": dense, "own_grids": own_grids}
        known |= {"conv_mode": status.get("conv_mode"), "answered": bool(status)}
        updates = {self.chat.methods: known, self.sweep.budgets: proposed(dense)}
        # What the worker was started with comes first, where the visitor has chosen nothing yet.
        default = (status.get("default_pruning") or {}).get("method")
        started = default if default != "none" else None
        for picker in self.pickers:
            wanted = values[picker.method] or (picker.default != "none" and started)
            updates |= picker.offer(known, wanted or None)
        return updates

    def follow_link(self, values: dict, request: gr.Request):
        """What the address of the page names: example, question, method and budget."""
        link, known = read_link(request.query_params), values[self.chat.methods]
        updates = {self.controls.image: gr.update()}  # gradio takes no empty answer
        if link.example is not None:
            updates |= self._example(link)
        if link.question:
            updates |= dict.fromkeys(self.questions, link.question)
        if link.method:
            updates |= self._method(link, known)
        return updates

    def _example(self, link: Link) -> dict:
        if not 1 <= link.example <= len(self.controls.samples):
            gr.Warning(f"The link names example {link.example}, which this page does not have.")
            return {}
        image, *questions = self.example(link.example - 1)
        return {self.controls.image: image, **dict(zip(self.questions, questions, strict=True))}

    def _method(self, link: Link, known: dict) -> dict:
        names = [link.first, *filter(None, [link.then])]
        if missing := [name for name in names if name not in known["methods"]]:
            gr.Warning(f"The link names the method {missing[0]}, which this model does not have.")
            return {}
        if link.then and link.then not in followers(known["methods"], link.first):
            gr.Warning(f"The link names {link.method}, but these do not work one after the other.")
            return {}
        return self.chat.picker.follow_link(known, link)

    def pressed(self, event: gr.EventData):
        """An example was chosen."""
        number = getattr(event, "number", None)
        if type(number) is not int or not 0 <= number < len(self.controls.samples):
            return [gr.skip()] * (1 + len(self.questions))
        return self.example(number)

    def example(self, number: int):
        """Image and question of an example, the question for every tab."""
        example = self.controls.samples[number]
        return example.picture, *(example.question for _ in self.questions)
