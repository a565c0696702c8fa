"""Which prompt template a model gets, by its name."""

from __future__ import annotations

from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import infer_conv_mode

AUTOMATIC = "automatic"


def template_of(model: str, choice: str = AUTOMATIC) -> str:
    """Name of the template for `model`; `choice` other than "automatic" is taken as it is.

    Raises ValueError on an unknown choice.
    """
    if choice != AUTOMATIC:
        if choice not in conv_templates:
            raise ValueError(f"unknown template {choice!r}, choose from {', '.join(choices())}")
        return choice
    name = model.lower()
    if "llava" not in name:
        return "llama_2" if "llama-2" in name else "vicuna_v1"
    if "mistral" in name or "mixtral" in name:
        return "chatml_direct" if "hermes" in name else "mistral_instruct"
    if "llama-2" not in name and ("mmtag" in name or ("plain" in name and "finetune" not in name)):
        return "v1_mmtag" if "v1" in name else "v0_mmtag"
    return infer_conv_mode(model)


def choices() -> list[str]:
    """All templates, the automatic choice first."""
    return [AUTOMATIC, *conv_templates]


def stop_of(conversation) -> str:
    """The text that ends an answer in the template of `conversation`."""
    single = conversation.sep_style in (SeparatorStyle.SINGLE, SeparatorStyle.MPT)
    return conversation.sep if single else conversation.sep2
