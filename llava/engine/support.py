"""What cannot be done by a language model in another program, with the reason.

A server takes a prompt as embeddings, one after the other. What that means for methods is in
`llava.pruning.apart`; here it is what it means for families and for options of `generate`.
"""

from __future__ import annotations

from ..constants import STRATEGIES
from ..pruning import Pruner
from ..pruning.apart import reason_apart

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
    if reason := reason_apart(pruner):
        raise ValueError(reason)


def check_options(options: dict) -> None:
    """Raises ValueError for keywords of `generate` that a server cannot follow."""
    for name, (nothing, reason) in NOT_TAKEN.items():
        value = options.get(name)
        if value is not None and value != nothing and value != []:
            raise ValueError(f"{name}={value!r} is not possible with a server: {reason}")
