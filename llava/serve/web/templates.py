"""Which prompt template a model gets: what its worker says, or else by its name."""

from __future__ import annotations

from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import infer_conv_mode

AUTOMATIC = "automatic"


def template_of(model: str, choice: str = AUTOMATIC, known: str | None = None) -> str:
    """Name of the template for `model`; `choice` other than "automatic" is taken as it is.

    known: what the model's worker says; without it the name has to do
    Raises ValueError on an unknown choice.
    """
    if choice != AUTOMATIC:
        if choice not in conv_templates:
            raise ValueError(f"unknown template {choice!r}, choose from {', '.join(choices())}")
        return choice
    if isinstance(known, str) and known in conv_templates:
        return known
    name = model.lower()
    if "llava" not in name and "llama-2" in name:
        return "llama_2"
    return infer_conv_mode(model)


def choices() -> list[str]:
    """All templates, the automatic choice first."""
    return [AUTOMATIC, *conv_templates]


def stop_of(conversation) -> str:
    """The text that ends an answer in the template of `conversation`."""
    single = conversation.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.MPT)
    return conversation.sep if single else conversation.sep2
