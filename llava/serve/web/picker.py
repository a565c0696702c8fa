"""The components with which a pruning method, its budget and its options are chosen."""

from __future__ import annotations

import gradio as gr

from ..limits import OPTION_CHARS
from .link import Link
from .menu import budget_label, budget_note, menu
from .methods import BUDGET, SHARE, Method, followers, largest_budget, pruning_request

MAX_OPTIONS = 12  # text boxes for options; a method with more shows only these, and says so
NOTHING_MORE = ("nothing more", "")
PERCENT, STEP = 22.2, 0.1  # what a share is at first, and how finely it is chosen
UNKNOWN = "The worker of this model offers no choice of pruning methods."
NOBODY = "Pruning methods can be chosen here as soon as a worker answers: reload this page then."
NO_METHOD = Method("none")
#: in the page, but not to be seen: what is not in the page at all may miss that it is shown again
HIDDEN = "hidden"


class MethodPicker:
    """Method menu, budget slider and option boxes; call inside the layout.

    Where the method acts before the decoder, a second one may be chosen that goes on inside of it.

    name:        prefix of the components' element ids
    known:       state of the page: the model's methods, and how many tokens its images have
    default:     method that is chosen first where the worker offers it
    with_budget: False where the budgets are chosen elsewhere; there is no second method then
    """

    def __init__(
        self,
        name: str,
        known: gr.State,
        default: str,
        label: str = "Pruning method",
        with_budget: bool = True,
    ):
        self.known, self.default, self.with_budget = known, default, with_budget
        with gr.Group():
            self.method = gr.Dropdown([], label=label, interactive=True, elem_id=f"{name}-method")
            self.note = gr.Markdown(visible=HIDDEN, elem_classes="pv-note", elem_id=f"{name}-note")
            self.own = _checkbox("Let the method decide how many tokens to keep", f"{name}-own")
            self.shares = _checkbox("As a share of an image's tokens", f"{name}-shares")
            self.budget = _budget_slider(f"{name}-budget")
            self.then = gr.Dropdown(
                [NOTHING_MORE],
                value="",
                label="And then, inside the decoder",
                visible=HIDDEN,
                interactive=True,
                elem_id=f"{name}-then",
            )
            self.then_budget = _budget_slider(f"{name}-then-budget")
        with gr.Accordion(
            "Method options", open=False, visible=HIDDEN, elem_id=f"{name}-options"
        ) as self.accordion:
            self.boxes = [
                gr.Textbox(visible=HIDDEN, max_lines=1, interactive=True, max_length=OPTION_CHARS)
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

    def connect(self) -> None:
        """Wires the events among the components."""
        quick = dict(show_progress="hidden", concurrency_limit=None)
        inputs = {self.known, self.method, self.shares, self.budget, self.own, self.then}
        self.method.input(self.chosen, inputs, self.outputs, **quick)
        behind = [self.then_budget, self.accordion, *self.boxes]
        self.then.input(self.followed, inputs, behind, **quick)
        scales = [self.budget, self.then, *behind]
        self.shares.input(self.rescaled, inputs, scales, **quick)
        self.own.input(self.decided, inputs, [self.budget, self.shares], **quick)

    def request(self, methods: dict[str, Method], values: dict) -> dict | None:
        """The "pruning" field for what is chosen. Raises Failure."""
        budget = None if values[self.own] else values[self.budget]
        texts = [values[box] or "" for box in self.boxes]
        name, then, shares = values[self.method], values[self.then], bool(values[self.shares])
        return pruning_request(methods, name, budget, texts, then, values[self.then_budget], shares)

    def offer(self, known: dict, wanted: str | None) -> dict:
        """Updates after the model changed: its methods in the menu, `wanted` kept if it is one;
        known: as in the state."""
        methods = known["methods"]
        if not methods:
            hidden = gr.update(visible=HIDDEN)
            updates = {component: hidden for component in self.outputs}
            note = UNKNOWN if known.get("answered", True) else NOBODY
            return {**updates, self.note: gr.update(value=note, visible=True)}
        name = next((n for n in (wanted, self.default) if n in methods), next(iter(methods)))
        updates = self.choose(known, name)
        shown = gr.update(choices=menu(methods), value=name, visible=True)
        return {**updates, self.method: shown}

    def choose(self, known: dict, name: str | None) -> dict:
        """Updates after a method was chosen: its budget and its options, all at their defaults.

        known: as in the state: "dense", the tokens of an image without pruning as far as they are
               known, and "own_grids", whether images differ in how many they have, so that a share
               is chosen first
        """
        methods = known["methods"]
        method = methods.get(name, NO_METHOD)
        undecided = BUDGET in method.options and method.budget is None
        shares = bool(known.get("own_grids")) and SHARE in method.options
        more = followers(methods, name) if self.with_budget and not method.reason else []
        note = _note(method, self.with_budget)
        return {
            self.note: gr.update(value=note, visible=_seen(note)),
            self.own: gr.update(visible=_seen(undecided and self.with_budget), value=undecided),
            self.shares: self._share_box(method, undecided, shares),
            self.budget: self.scaled(known, method, shares, undecided),
            self.then: gr.update(
                choices=[NOTHING_MORE, *menu(methods, more)], value="", visible=_seen(more)
            ),
            **self.follow(methods, name, "", None),
        }

    def scaled(self, known: dict, method: Method, shares: bool, undecided: bool) -> dict:
        """Update of the budget's slider.

        shares:    it is a share of an image's tokens
        undecided: the method decides, so that there is no slider
        """
        shown = BUDGET in method.options and self.with_budget and not undecided
        label, option = budget_label(method, method.takes(shares)), method.takes(shares)
        if option == SHARE:
            scale = _scale(option, 100, PERCENT)
        else:
            most = largest_budget(known["methods"], known["dense"])
            scale = _scale(option, most, min(method.budget or max(1, most // 9), most))
        return gr.update(visible=_seen(shown), label=label, **scale)

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
        second = methods.get(then, NO_METHOD)
        options = _labelled(methods.get(name), "") + _labelled(methods.get(then), f"{then}: ")
        option = second.takes(shares)
        most = max(int(budget or 2), 2)
        scale = _scale(option, 100, 50) if option == SHARE else _scale(option, most, most // 2)
        label = budget_label(second, option, behind=True)
        updates = {
            self.then_budget: gr.update(
                visible=_seen(BUDGET in second.options), label=label, **scale
            ),
            self.accordion: gr.update(visible=_seen(options)),
        }
        for number, box in enumerate(self.boxes):
            updates[box] = gr.update(visible=HIDDEN, value="")
            if number < len(options):
                label, default = options[number]
                shown = "worked out by the method" if default is None else default
                updates[box] = gr.update(
                    visible=True, label=label, placeholder=f"default: {shown}", value=""
                )
        return updates

    def follow_link(self, known: dict, link: Link) -> dict:
        """Updates that choose what a link says; its method must be one of `known`."""
        first, then, methods = link.first, link.then, known["methods"]
        method = methods[first]
        shares = link.shares and SHARE in method.options
        undecided = BUDGET in method.options and method.budget is None and link.budget is None
        updates = self.choose(known, first) | {self.method: gr.update(value=first)}
        updates[self.own] = gr.update(value=undecided, visible=updates[self.own]["visible"])
        updates[self.shares] = self._share_box(method, undecided, shares)
        budget = self.scaled(known, method, shares, undecided)
        if link.budget is not None:
            budget["value"] = _within(budget, link.budget)
        updates[self.budget] = budget
        if then:
            updates |= self.follow(methods, first, then, budget["value"], shares)
            updates[self.then]["value"] = then
            if link.then_budget is not None:
                scale = updates[self.then_budget]
                scale["value"] = _within(scale, link.then_budget)
        texts = _texts(method, methods.get(then), link.options)
        for box, text in zip(self.boxes, texts, strict=False):
            updates[box]["value"] = text
        return updates

    def chosen(self, values: dict) -> dict:
        return self.choose(values[self.known], values[self.method])

    def followed(self, values: dict) -> dict:
        methods, shares = values[self.known]["methods"], bool(values[self.shares])
        name, then = values[self.method], values[self.then]
        return self.follow(methods, name, then, values[self.budget], shares)

    def rescaled(self, values: dict) -> dict:
        """After it was decided whether the budget is a share of an image's tokens."""
        known = values[self.known]
        method = known["methods"].get(values[self.method], NO_METHOD)
        scale = self.scaled(known, method, bool(values[self.shares]), bool(values[self.own]))
        hidden = {self.then: gr.update(value=""), self.then_budget: gr.update(visible=HIDDEN)}
        own = len(method.extra)  # the boxes behind are those of the second method, which goes
        hidden |= {box: gr.update(visible=HIDDEN, value="") for box in self.boxes[own:]}
        return {self.budget: scale, **hidden, self.accordion: gr.update(visible=_seen(own))}

    def decided(self, values: dict) -> dict:
        """After it was decided whether the method decides how many tokens it keeps."""
        known, own = values[self.known], bool(values[self.own])
        method = known["methods"].get(values[self.method], NO_METHOD)
        shares = bool(values[self.shares])
        return {
            self.budget: self.scaled(known, method, shares, own),
            self.shares: self._share_box(method, own, shares),
        }

    def _share_box(self, method: Method, undecided: bool, shares: bool) -> dict:
        shown = SHARE in method.options and self.with_budget and not undecided
        return gr.update(visible=_seen(shown), value=shares)


def _seen(shown) -> bool | str:
    """What gradio takes for `visible`."""
    return True if shown else HIDDEN


def _note(method: Method, with_budget: bool) -> str:
    """What stands below the menu: how the method chooses, and what keeps it from being used."""
    parts = [f"{method.about[:1].upper()}{method.about[1:]}."] if method.about else []
    if with_budget:
        parts.append(budget_note(method))
    if method.reason is not None:
        parts.append(f"**Not available:** {method.reason}")
    if len(method.extra) > MAX_OPTIONS:
        parts.append(f"Only the first {MAX_OPTIONS} options are shown.")
    return " ".join(filter(None, parts))


def _labelled(method: Method | None, prefix: str) -> list[tuple]:
    """(label, default) of the options beside the budget."""
    return [(prefix + name, default) for name, default in (method.extra if method else {}).items()]


def _texts(method: Method, second: Method | None, options: dict[str, str]) -> list[str]:
    """What a link's options put into the boxes, in their order."""
    if second is None:
        return [options.get(name, "") for name in method.extra]
    return [options.get(f"{one.name}_{name}", "") for one in (method, second) for name in one.extra]


def _scale(option: str, maximum: int, value: float) -> dict:
    """What a budget slider reaches."""
    return {"maximum": maximum, "step": STEP if option == SHARE else 1, "value": value}


def _within(scale: dict, value: float) -> float:
    """The value, or the end of the slider that it lies beyond."""
    return max(1, min(value, scale["maximum"]))


def _checkbox(label: str, name: str) -> gr.Checkbox:
    return gr.Checkbox(False, label=label, visible=HIDDEN, interactive=True, elem_id=name)


def _budget_slider(name: str) -> gr.Slider:
    """Hidden until a method says how far it reaches; name: its element id."""
    # gradio's button resets to the value here, which is no method's default.
    return gr.Slider(1, 2, 1, step=1, visible=HIDDEN, elem_id=name, interactive=True, buttons=[])
