"""The methods that a worker offers, and the "pruning" field of a request."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from ..limits import OPTION_CHARS
from .failures import Failure

BUDGET = "visual_token_num"
#: the budget as a share of an image's tokens, in place of the number
SHARE = "visual_token_ratio"
#: what a worker says of a method beside its options
SAID = ("about", "acts", "trained", "counts", "from_layer")


@dataclass(frozen=True)
class Method:
    """A pruning method as a worker lists it in its status.

    options: name -> default; reason: why the method cannot be used, None when it can; place: where
    it may stand in a combination of two methods, "first" or "second"
    about: how it chooses; acts: "nowhere", "before", "inside" or "both", seen from the decoder;
    counts, from_layer: what its budget is. Workers of older versions do not say these.
    """

    name: str
    options: dict = field(default_factory=dict)
    reason: str | None = None
    place: str | None = None
    about: str = ""
    acts: str = ""
    trained: bool = False
    counts: str | None = None
    from_layer: int | None = None

    @property
    def budget(self) -> int | None:
        """Default of the token budget, None where the method has none or works it out itself."""
        return self.options.get(BUDGET)

    def takes(self, shares: bool) -> str:
        """The option that is its budget, where those are shares, if it can."""
        return SHARE if shares and SHARE in self.options else BUDGET

    @property
    def extra(self) -> dict:
        """The options beside the budget."""
        own = self.options.items()
        return {name: default for name, default in own if name not in (BUDGET, SHARE)}


def offered(status: dict) -> dict[str, Method]:
    """The methods in a worker's status by name; empty for a worker that knows nothing of them."""
    methods = {}
    for entry in status.get("pruning_methods") or []:
        options = entry.get("options") or {}
        reason = None if entry.get("available", True) else entry.get("reason") or "not available"
        said = {key: entry[key] for key in SAID if entry.get(key) is not None}
        method = Method(str(entry["name"]), dict(options), reason, entry.get("place"), **said)
        methods[method.name] = method
    return methods


def largest_budget(methods: dict[str, Method], dense_tokens: int | None) -> int:
    """Right end of the budget slider: the dense count where it is known, else twice the largest
    default."""
    defaults = [method.budget or 0 for method in methods.values()]
    return dense_tokens or max(2 * max(defaults, default=0), 2)


def followers(methods: dict[str, Method], name: str | None) -> list[str]:
    """Methods that can go on inside the decoder where the method `name` left off."""
    if name not in methods or methods[name].place != "first":
        return []
    return [
        other.name for other in methods.values() if other.place == "second" and not other.reason
    ]


def pruning_request(
    methods: dict[str, Method],
    name: str | None,
    budget: float | None,
    texts: list[str],
    then: str | None = None,
    then_budget: float | None = None,
    shares: bool = False,
) -> dict | None:
    """The "pruning" field of a request; None leaves the choice to the worker.

    budget: tokens per image, None for the method's own
    shares: budgets are percent of an image's tokens, for methods that know shares
    texts:  what was typed for the options beside the budgets, in their order; "" is the default
    then:   the method that goes on inside the decoder, with its own budget
    Raises Failure when a method cannot be used, or a text is no value for its option.
    """
    if not methods or not name:
        return None
    first = _usable(methods, name)
    if not then:
        options = _options(first, texts) | _amount(first, budget, shares)
        return {"method": name, BUDGET: options.pop(BUDGET, None), "options": options}
    second = _usable(methods, then)
    parts = (first, texts, budget), (second, texts[len(first.extra) :], then_budget)
    options = {}
    for method, own, tokens in parts:
        values = _options(method, own) | _amount(method, tokens, shares)
        options |= {f"{method.name}_{option}": value for option, value in values.items()}
    return {"method": f"{name}+{then}", BUDGET: None, "options": options}


def _usable(methods: dict[str, Method], name: str) -> Method:
    method = methods.get(name)
    if method is None:
        raise Failure("no_method")
    if method.reason is not None:
        raise Failure("no_method", f"The method {name} is not available: {method.reason}")
    return method


def _amount(method: Method, budget: float | None, shares: bool) -> dict:
    """The budget as an option of the method; nothing where it has none."""
    option = method.takes(shares)
    if budget is None or option not in method.options:
        return {}
    return {option: round(budget / 100, 4) if option == SHARE else int(budget)}


def _options(method: Method, texts: list[str]) -> dict:
    return {
        option: _value(option, text, default)
        for (option, default), text in zip(method.extra.items(), texts, strict=False)
        if text and text.strip()
    }


def _value(option: str, text: str, default):
    text = text.strip()
    if len(text) > OPTION_CHARS:
        raise Failure("bad_option", f"The text for {option} is longer than {OPTION_CHARS}.")
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text  # a bare word; whether it is a value, the worker knows
    value = list(value) if isinstance(value, tuple) else value
    if default is None or isinstance(value, type(default)):
        return value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kind = {bool: "True or False", int: "a whole number", float: "a number"}
    raise Failure(
        "bad_option", f"{option} must be {kind.get(type(default), 'a value')}, not {text!r}."
    )
