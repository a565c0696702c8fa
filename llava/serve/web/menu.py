"""The method menu: a line for every method, in groups by where it acts, and trained or not."""

from __future__ import annotations

from ...pruning.about import GROUPS, PLACES, group_name
from .methods import BUDGET, SHARE, Method

MARK = " · "  # before the name of the group at the end of a line


def group_of(method: Method) -> str:
    """Name of the group; "" where the worker says nothing of it."""
    if method.acts not in PLACES:
        return ""
    return group_name(method.acts, method.trained)


def line_of(method: Method) -> str:
    """What the menu says: name, how the method chooses, and the group, by all of which it can be
    searched."""
    about = f": {method.about}" if method.about else ""
    name = method.name if method.reason is None else f"{method.name} (not available)"
    group = group_of(method)
    return f"{name}{about}{MARK}{group}" if group else f"{name}{about}"


def menu(methods: dict[str, Method], names: list[str] | None = None) -> list[tuple[str, str]]:
    """(line, name) of the methods, group by group; `names`: only of these."""
    listed = methods.values() if names is None else [methods[name] for name in names]
    return [(line_of(method), method.name) for method in sorted(listed, key=_rank)]


def _rank(method: Method) -> int:
    place = (method.acts, method.trained)
    return GROUPS.index(place) if place in GROUPS else len(GROUPS)


def headings() -> str:
    """Style sheet that puts the name of its group above the first line of every group that a list
    shows, whichever lines a search leaves in it."""
    rules = []
    for place, trained in GROUPS:
        name = group_of(Method("", acts=place, trained=trained))
        own = f"li[aria-label$='{MARK}{name}']"
        first = f"{own}:first-child::before, li:not([aria-label$='{MARK}{name}']) + {own}::before"
        rules.append(f"{first} {{ content: '{name.capitalize()}'; }}")
    return "\n".join(rules)


#: the budget sliders of a method and of the one behind it, as numbers of tokens and as shares
LABELS = {
    BUDGET: ("Visual tokens per image", "Of these, tokens"),
    SHARE: ("Share of an image's tokens, %,", "Of these, %"),
}
#: what a budget counts, as a worker says it -> how a label goes on; {layer}: where it starts
COUNTED = {
    "average": " on average over the layers",
    "later layers": " from layer {layer} on",
    "at most": " at most",
}


def budget_label(method: Method, option: str, behind: bool = False) -> str:
    """Label of the slider with a method's budget.

    option: the budget's option, a number of tokens or a share
    behind: the method goes on where another one left off
    """
    counted = COUNTED.get(method.counts, "").format(layer=method.from_layer)
    return f"{LABELS[option][behind]}{counted}".rstrip(",")


def budget_note(method: Method) -> str:
    """A sentence where the budget is not what the card of tokens shows; "" where it is."""
    if method.counts == "later layers":
        return (
            f"Layers before layer {method.from_layer} see all tokens, so the average over the "
            "layers is higher than the number set here."
        )
    return ""
