"""The models of both families; importing them makes them known to transformers' `Auto` classes."""

from ..checkpoint_kind import SUPPORTED
from .language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from .language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from .language_model.qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

__all__ = [
    "LlavaConfig",
    "LlavaLlamaForCausalLM",
    "LlavaMistralConfig",
    "LlavaMistralForCausalLM",
    "Qwen2_5_VLConfig",
    "Qwen2_5_VLForConditionalGeneration",
]


def __getattr__(name: str):
    if name.startswith("LlavaMpt"):
        # An AttributeError would be told as a name that cannot be imported, without a reason.
        raise ImportError(f"{name} is not here: LLaVA on MPT is not supported; {SUPPORTED}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
