"""The components with which a pruning method, its budget and its options are chosen."""

from __future__ import annotations

import gradio as gr

from ..limits import OPTION_CHARS
from .methods import BUDGET, SHARE, Method, followers, largest_budget, pruning_request

MAX_OPTIONS = 12  # text boxes for options; a method with more shows only these, and says so
NOTHING_MORE = ("nothing more", "")
#: the budget sliders of a method and of the one behind it, as numbers of tokens and as shares
LABELS = {
    BUDGET: ("Visual tokens per image", "Of these, tokens on average over the layers"),
    SHARE: ("Share of an image's tokens, %", "Of these, % on average over the layers"),
}
PERCENT, STEP = 22.2, 0.1  # what a share is at first, and how finely it is chosen
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
            self.shares = gr.Checkbox(
                False,
                label="As a share of an image's tokens",
                visible=False,
                interactive=True,
                elem_id=f"{name}-shares",
            )
            self.budget = _budget_slider(0, f"{name}-budget")
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
            self.then_budget = _budget_slider(1, f"{name}-then-budget")
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
        chosen = {self.method, self.shares, self.budget, self.own, self.then, self.then_budget}
        return chosen.union(self.boxes)

    @property
    def outputs(self) -> list:
        """Components that `offer` and `choose` write."""
        own = [self.method, self.note, self.shares, self.budget, self.own, self.then]
        return [*own, self.then_budget, self.accordion, *self.boxes]

    def request(self, methods: dict[str, Method], values: dict) -> dict | None:
        """The "pruning" field for what is chosen. Raises Failure."""
        budget = None if values[self.own] else values[self.budget]
        texts = [values[box] or "" for box in self.boxes]
        name, then, shares = values[self.method], values[self.then], bool(values[self.shares])
        return pruning_request(methods, name, budget, texts, then, values[self.then_budget], shares)

    def offer(
        self,
        methods: dict[str, Method],
        chosen: str | None,
        dense: int | None,
        own_grids: bool = False,
    ) -> dict:
        """Updates after the model changed: its methods in the menu, `chosen` kept if it is one;
        dense, own_grids: as in `choose`."""
        if not methods:
            hidden = gr.update(visible=False)
            updates = {component: hidden for component in self.outputs}
            return {**updates, self.note: gr.update(value=UNKNOWN, visible=True)}
        name = next((n for n in (chosen, self.default) if n in methods), next(iter(methods)))
        menu = [(method.label, method.name) for method in methods.values()]
        updates = self.choose(methods, name, dense, own_grids)
        return {**updates, self.method: gr.update(choices=menu, value=name, visible=True)}

    def choose(
        self,
        methods: dict[str, Method],
        name: str | None,
        dense: int | None,
        own_grids: bool = False,
    ) -> dict:
        """Updates after a method was chosen: its budget and its options, all at their defaults.

        dense:     tokens of an image without pruning, as far as known
        own_grids: images differ in how many they have, so that a share is chosen first
        """
        method = methods.get(name, Method("none"))
        has_budget = BUDGET in method.options
        undecided = has_budget and method.budget is None
        note = "" if method.reason is None else f"**Not available:** {method.reason}"
        shares = own_grids and SHARE in method.options
        if len(method.extra) > MAX_OPTIONS:
            note += f" Only the first {MAX_OPTIONS} options are shown."
        more = [] if method.reason else followers(methods, name)
        menu = [NOTHING_MORE, *((other, other) for other in more)]
        return {
            self.note: gr.update(value=note, visible=bool(note)),
            self.shares: gr.update(visible=SHARE in method.options, value=shares),
            self.budget: self.measured(methods, name, dense, shares),
            self.own: gr.update(visible=undecided, value=undecided),
            self.then: gr.update(choices=menu, value="", visible=bool(more)),
            **self.follow(methods, name, "", None),
        }

    def measured(
        self, methods: dict[str, Method], name: str | None, dense: int | None, shares: bool
    ) -> dict:
        """Update of the budget after it was decided whether it is a share of an image's tokens."""
        method = methods.get(name, Method("none"))
        if (option := method.takes(shares)) == SHARE:
            scale = _scale(option, 0, 100, PERCENT)
        else:
            most = largest_budget(methods, dense)
            scale = _scale(option, 0, most, min(method.budget or max(1, most // 9), most))
        return gr.update(visible=BUDGET in method.options, **scale)

    def follow(
        self,
        methods: dict[str, Method],
        name: str | None,
        then: str | None,
        budget: float | None,
        shares: bool = False,
    ) -> dict:
        """Updates after the second method was chosen: half of the `budget` of the first, or of the
        share, and the boxes of both methods' options, emptied."""
        second = methods.get(then, Method("none"))
        options = _labelled(methods.get(name), "") + _labelled(methods.get(then), f"{then}: ")
        if (option := second.takes(shares)) == SHARE:
            scale = _scale(option, 1, 100, 50)
        else:
            most = max(int(budget or 2), 2)
            scale = _scale(option, 1, most, most // 2)
        updates = {
            self.then_budget: gr.update(visible=BUDGET in second.options, **scale),
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


def _scale(option: str, place: int, maximum: int, value: float) -> dict:
    """What a budget slider says and reaches; place: 0, or 1 for the method behind."""
    step = STEP if option == SHARE else 1
    return {"label": LABELS[option][place], "maximum": maximum, "step": step, "value": value}


def _budget_slider(place: int, name: str) -> gr.Slider:
    """Hidden until a method says how far it reaches; name: its element id."""
    label = LABELS[BUDGET][place]
    return gr.Slider(1, 2, 1, step=1, label=label, visible=False, elem_id=name, interactive=True)
