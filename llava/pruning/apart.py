"""Whether a method works where the decoder is another program: a server that takes a prompt as
embeddings, calls no hook, knows no image, and counts positions through.

Methods are judged by what they declare, never by name.
"""

from __future__ import annotations

from collections.abc import Mapping

from .base import Pruner
from .stages import acts_inside
from .tokens import KEY_BIAS


def reason_apart(pruner: Pruner) -> str | None:
    """Why a method cannot be used there; None: it can, as far as what it declares tells."""
    if acts_inside(pruner.decoder):
        return (
            f"{pruner.name} acts inside the decoder, which runs in a server: use a method that "
            "acts before it"
        )
    if pruner.vision.position_policy != "sequence":
        return (
            f"{pruner.name} leaves visual tokens at their places in the unpruned image, but a "
            "server counts the tokens of a prompt through"
        )
    return None


def check_bias(extras: Mapping, position_bias: object = None) -> None:
    """Raises ValueError where tokens carry a bias of the decoder's attention, which no server is
    told; position_bias: that of prompts or images, None where there is none."""
    if KEY_BIAS in extras or position_bias is not None:
        raise ValueError(
            "the method adds to attention in the decoder, which runs in a server: its answers "
            "would be others"
        )
