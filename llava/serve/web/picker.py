"""The components with which a pruning method, its budget and its options are chosen."""

from __future__ import annotations

import gradio as gr

from ..limits import OPTION_CHARS
from .methods import BUDGET, Method, largest_budget, pruning_request

MAX_OPTIONS = 12  # text boxes for options; a method with more shows only these, and says so
UNKNOWN = "The worker of this model offers no choice of pruning methods."


class MethodPicker:
    """Method menu, budget slider and option boxes; call inside the layout.

    name:    prefix of the components' element ids
    default: method that is chosen first where the worker offers it
    """

    def __init__(self, name: str, default: str, label: str = "Pruning method"):
        self.default = default
        with gr.Group():
            self.method = gr.Dropdown([], label=label, interactive=True, elem_id=f"{name}-method")
            self.note = gr.Markdown(visible=False, elem_classes="pv-note", elem_id=f"{name}-note")
            self.budget = gr.Slider(
                1,
                2,
                1,
                step=1,
                label="Visual tokens per image",
                visible=False,
                elem_id=f"{name}-budget",
                interactive=True,
            )
            self.own = gr.Checkbox(
                False, label="Let the method decide how many", visible=False, interactive=True
            )
        with gr.Accordion("Method options", open=False, visible=False) as self.accordion:
            self.boxes = [
                gr.Textbox(visible=False, max_lines=1, interactive=True, max_length=OPTION_CHARS)
                for _ in range(MAX_OPTIONS)
            ]

    @property
    def inputs(self) -> set:
        """Components that `request` reads."""
        return {self.method, self.budget, self.own, *self.boxes}

    @property
    def outputs(self) -> list:
        """Components that `offer` and `choose` write."""
        return [self.method, self.note, self.budget, self.own, self.accordion, *self.boxes]

    def request(self, methods: dict[str, Method], values: dict) -> dict | None:
        """The "pruning" field for what is chosen. Raises Failure."""
        budget = None if values[self.own] else values[self.budget]
        texts = [values[box] or "" for box in self.boxes]
        return pruning_request(methods, values[self.method], budget, texts)

    def offer(self, methods: dict[str, Method], chosen: str | None, dense: int | None) -> dict:
        """Updates after the model changed: its methods in the menu, `chosen` kept if it is one."""
        if not methods:
            hidden = gr.update(visible=False)
            updates = {component: hidden for component in self.outputs}
            return {**updates, self.note: gr.update(value=UNKNOWN, visible=True)}
        name = next((n for n in (chosen, self.default) if n in methods), next(iter(methods)))
        menu = [(method.label, method.name) for method in methods.values()]
        updates = self.choose(methods, name, dense)
        return {**updates, self.method: gr.update(choices=menu, value=name, visible=True)}

    def choose(self, methods: dict[str, Method], name: str | None, dense: int | None) -> dict:
        """Updates after a method was chosen: its budget and its options, all at their defaults."""
        method = methods.get(name, Method("none"))
        has_budget = BUDGET in method.options
        undecided = has_budget and method.budget is None
        note = "" if method.reason is None else f"**Not available:** {method.reason}"
        most = largest_budget(methods, dense)
        options = list(method.extra.items())
        if len(options) > MAX_OPTIONS:
            note += f" Only the first {MAX_OPTIONS} options are shown."
        updates = {
            self.note: gr.update(value=note, visible=bool(note)),
            self.budget: gr.update(
                visible=has_budget,
                maximum=most,
                value=min(method.budget or max(1, most // 9), most),
            ),
            self.own: gr.update(visible=undecided, value=undecided),
            self.accordion: gr.update(visible=bool(options)),
        }
        for number, box in enumerate(self.boxes):
            updates[box] = gr.update(visible=False, value="")
            if number < len(options):
                option, default = options[number]
                shown = "worked out by the method" if default is None else default
                updates[box] = gr.update(
                    visible=True, label=option, placeholder=f"default: {shown}", value=""
                )
        return updates
