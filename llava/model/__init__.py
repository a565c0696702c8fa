"""The models of both families; importing them makes them known to transformers' `Auto` classes."""

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
