"""The components with which a pruning method, its budget and its options are chosen."""

from __future__ import annotations

import gradio as gr

from ..limits import OPTION_CHARS
from .methods import BUDGET, Method, followers, largest_budget, pruning_request

MAX_OPTIONS = 12  # text boxes for options; a method with more shows only these, and says so
NOTHING_MORE = ("nothing more", "")
UNKNOWN = "The worker of this model offers no choice of pruning methods."


class MethodPicker:
    """Method menu, budget slider and option boxes; call inside the layout.

    Where the method acts before the decoder, a second one may be chosen that goes on inside of it.

    name:    prefix of the components' element ids
    default: method that is chosen first where the worker offers it
    """

    def __init__(self, name: str, default: str, label: str = "Pruning method"):
        self.default = default
        with gr.Group():
            self.method = gr.Dropdown([], label=label, interactive=True, elem_id=f"{name}-method")
            self.note = gr.Markdown(visible=False, elem_classes="pv-note", elem_id=f"{name}-note")
            self.budget = _budget_slider("Visual tokens per image", f"{name}-budget")
            self.own = gr.Checkbox(
                False, label="Let the method decide how many", visible=False, interactive=True
            )
            self.then = gr.Dropdown(
                [NOTHING_MORE],
                value="",
                label="And then, inside the decoder",
                visible=False,
                interactive=True,
                elem_id=f"{name}-then",
            )
            self.then_budget = _budget_slider(
                "Of these, tokens on average over the layers", f"{name}-then-budget"
            )
        with gr.Accordion(
            "Method options", open=False, visible=False, elem_id=f"{name}-options"
        ) as self.accordion:
            self.boxes = [
                gr.Textbox(visible=False, max_lines=1, interactive=True, max_length=OPTION_CHARS)
                for _ in range(MAX_OPTIONS)
            ]

    @property
    def inputs(self) -> set:
        """Components that `request` reads."""
        chosen = {self.method, self.budget, self.own, self.then, self.then_budget}
        return chosen.union(self.boxes)

    @property
    def outputs(self) -> list:
        """Components that `offer` and `choose` write."""
        own = [self.method, self.note, self.budget, self.own, self.then]
        return [*own, self.then_budget, self.accordion, *self.boxes]

    def request(self, methods: dict[str, Method], values: dict) -> dict | None:
        """The "pruning" field for what is chosen. Raises Failure."""
        budget = None if values[self.own] else values[self.budget]
        texts = [values[box] or "" for box in self.boxes]
        name, then = values[self.method], values[self.then]
        return pruning_request(methods, name, budget, texts, then, values[self.then_budget])

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
        if len(method.extra) > MAX_OPTIONS:
            note += f" Only the first {MAX_OPTIONS} options are shown."
        more = [] if method.reason else followers(methods, name)
        menu = [NOTHING_MORE, *((other, other) for other in more)]
        return {
            self.note: gr.update(value=note, visible=bool(note)),
            self.budget: gr.update(
                visible=has_budget,
                maximum=most,
                value=min(method.budget or max(1, most // 9), most),
            ),
            self.own: gr.update(visible=undecided, value=undecided),
            self.then: gr.update(choices=menu, value="", visible=bool(more)),
            **self.follow(methods, name, "", None),
        }

    def follow(
        self, methods: dict[str, Method], name: str | None, then: str | None, budget: int | None
    ) -> dict:
        """Updates after the second method was chosen: half of the `budget` of the first, and the
        boxes of both methods' options, emptied."""
        second = methods.get(then)
        options = _labelled(methods.get(name), "") + _labelled(second, f"{then}: ")
        most = max(int(budget or 2), 2)
        updates = {
            self.then_budget: gr.update(
                visible=second is not None and BUDGET in second.options,
                maximum=most,
                value=most // 2,
            ),
            self.accordion: gr.update(visible=bool(options)),
        }
        for number, box in enumerate(self.boxes):
            updates[box] = gr.update(visible=False, value="")
            if number < len(options):
                label, default = options[number]
                shown = "worked out by the method" if default is None else default
                updates[box] = gr.update(
                    visible=True, label=label, placeholder=f"default: {shown}", value=""
                )
        return updates


def _labelled(method: Method | None, prefix: str) -> list[tuple]:
    """(label, default) of the options beside the budget."""
    return [(prefix + name, default) for name, default in (method.extra if method else {}).items()]


def _budget_slider(label: str, name: str) -> gr.Slider:
    """Hidden until a method says how far it reaches; name: its element id."""
    return gr.Slider(1, 2, 1, step=1, label=label, visible=False, elem_id=name, interactive=True)
