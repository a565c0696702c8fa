"""What cannot be done by a language model in another program, with the reason.

A server takes a prompt as embeddings, one after the other: it knows no image, calls no hook, and
counts positions through. Methods and options are judged by what they declare, never by name.
"""

from __future__ import annotations

from ..constants import STRATEGIES
from ..pruning import Pruner
from ..pruning.stages import DecoderStage, fills

#: hooks of a method that are called while the decoder runs
INSIDE = ("probe", "before_layer", "after_layers")
ALONE = "tower, projector and method run here, the language model in a server"
#: keywords of `generate` that a server cannot follow, the value that asks for nothing, and why
NOT_TAKEN = {
    "num_beams": (1, "it has no beam search"),
    "use_cache": (True, "it always has a cache"),
    "repetition_penalty": (1.0, "it would count the tokens of the prompt, which it does not know"),
    "no_repeat_ngram_size": (0, "it has no such rule"),
    "num_return_sequences": (1, "one prompt has one answer here"),
    "output_scores": (False, "it sends tokens alone"),
    "output_attentions": (False, "it sends tokens alone"),
    "output_hidden_states": (False, "it sends tokens alone"),
    "return_dict_in_generate": (False, "it sends tokens alone"),
    "generation_strategy": (STRATEGIES[0], "guesses are made inside the decoder"),
    "logits_processor": (None, "it chooses tokens itself"),
}


def reason_of_method(pruner: Pruner) -> str | None:
    """Why the answers to images pruned by a method cannot come from a server; None: they can."""
    if fills(type(pruner.decoder), DecoderStage, *INSIDE):
        return f"{pruner.name} acts inside the decoder, but {ALONE}: use a method that acts before"
    if pruner.vision.position_policy != "sequence":
        return (
            f"{pruner.name} leaves visual tokens at their places in the unpruned image, but a "
            "server counts the tokens of a prompt through"
        )
    return None


def reason_of_model(model_class: type) -> str | None:
    """Why the decoder of a family cannot be in a server; None: it can."""
    if axes := model_class.position_axes:
        return (
            f"{model_class.__name__} gives the tokens of an image positions on {axes[0]} axes, "
            "which a server is not told: its language model has to run here"
        )
    return None


def check_method(pruner: Pruner) -> None:
    """Raises ValueError with the reason where a method cannot go this way."""
    if reason := reason_of_method(pruner):
        raise ValueError(reason)


def check_options(options: dict) -> None:
    """Raises ValueError for keywords of `generate` that a server cannot follow."""
    for name, (nothing, reason) in NOT_TAKEN.items():
        value = options.get(name)
        if value is not None and value != nothing and value != []:
            raise ValueError(f"{name}={value!r} is not possible with a server: {reason}")
