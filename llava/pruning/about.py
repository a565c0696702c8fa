"""What a method's class says of it: how it chooses, where it acts, what its budget counts."""

from __future__ import annotations

import sys
from dataclasses import Field, fields, is_dataclass

from .base import Pruner
from .choice import BUDGETS
from .stages import HOOKS, DecoderStage, Stage, VisionStage, fills

#: what a budget may count, see `what_budget_counts`
EVERY_LAYER, AVERAGE, LATER_LAYERS, AT_MOST = "every layer", "average", "later layers", "at most"
#: where a method acts -> the name of its group in a list of methods
PLACES = {
    "nowhere": "no pruning",
    "before": "before the decoder",
    "inside": "inside the decoder",
    "both": "before and inside the decoder",
}
#: (where it acts, whether it was trained) of the groups, in their order
GROUPS = [(place, trained) for trained in (False, True) for place in PLACES]
SLACK = 0.05  # share by which an average may miss the budget, as layers are whole


def sentence_about(method: type[Pruner]) -> str:
    """The first sentence of a method's file, "NAME: how it chooses"; of a file that says nothing
    the name of its class."""
    if method is Pruner:
        return "None: plain LLaVA, all visual tokens stay."
    if not (text := sys.modules[method.__module__].__doc__):
        return f"{method.name}: {method.__module__}.{method.__qualname__}"
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return paragraph.partition(". ")[0].rstrip(".") + "."


def how_it_chooses(method: type[Pruner]) -> str:
    """`sentence_about` without the name and the full stop."""
    sentence = sentence_about(method)
    return (sentence.partition(": ")[2] or sentence).rstrip(".")


def acts(method: type[Pruner], stage: type[Stage]) -> bool:
    """Whether a method does anything in a stage."""
    return issubclass(method, stage) and fills(method, stage, *HOOKS[stage])


def where_it_acts(method: type[Pruner]) -> str:
    """Seen from the decoder: "before", "inside", "both" or "nowhere"."""
    before, inside = acts(method, VisionStage), acts(method, DecoderStage)
    return {(True, False): "before", (False, True): "inside", (True, True): "both"}.get(
        (before, inside), "nowhere"
    )


def is_trained(method: type[Pruner]) -> bool:
    """Whether a method needs a part of its own that was trained."""
    return method.part_folders is not Pruner.part_folders and not method.part_is_optional


def group_name(place: str, trained: bool) -> str:
    """What the group of methods that act there is called in a list."""
    return PLACES[place] + (", trained" if trained else "")


def settings_in_words(pruner: Pruner) -> list[str]:
    """A line on every method that a setting consists of and that has options: "FastV: layer 2". Of
    the method in a wrapper the budget is left out, as the wrapper sets it."""
    lines, inner = [], False
    for one in pruner.named.values():
        known: tuple[Field, ...] = fields(one) if is_dataclass(one) else ()
        options = {option.name: getattr(one, option.name) for option in known}
        around = [value for value in options.values() if isinstance(value, Pruner)]
        hidden = BUDGETS if inner else ()
        said = [
            f"{key} {value}"
            for key, value in options.items()
            if value is not None and value not in around and key not in hidden
        ]
        title = " around ".join(type(method).__name__ for method in (one, *around))
        if options:
            lines.append(f"{title}: {', '.join(said) or 'all options at their defaults'}")
        inner = bool(around)
    return lines


def what_budget_counts(
    pruner: Pruner, num_patches: int, num_layers: int
) -> tuple[str, int | None] | None:
    """What the `visual_token_num` of a method means on a decoder of `num_layers` layers for an
    image of `num_patches` tokens.

    (EVERY_LAYER, None):  tokens in all layers
    (LATER_LAYERS, K):    tokens from layer K on; earlier layers see more
    (AVERAGE, None):      tokens on average over the layers
    (AT_MOST, None):      what an image may keep at most; how many it keeps, the method decides
    None:                 none of these
    """
    if pruner.adaptive:
        return AT_MOST, None
    budget = pruner.visual_token_num  # type: ignore[attr-defined] # asked of those that have it
    tokens = pruner.token_schedule(num_patches, num_layers)
    if set(tokens) == {budget}:
        return EVERY_LAYER, None
    if tokens[-1] == budget:
        return LATER_LAYERS, tokens.index(budget)
    if abs(sum(tokens) / num_layers - budget) <= SLACK * budget:
        return AVERAGE, None
    return None
