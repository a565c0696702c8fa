"""LLaVA on a Mistral decoder: the same layers with grouped queries, under their own names."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

from ...image_settings import KnowsMethod
from .llava_llama import LlavaLlamaForCausalLM, LlavaLlamaModel


class LlavaMistralConfig(KnowsMethod, MistralConfig):
    model_type = "llava_mistral"


class LlavaMistralModel(LlavaLlamaModel):
    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaLlamaForCausalLM):
    """Mistral-based LLaVA-NeXT, without sliding windows (released checkpoints use none)."""

    config_class = LlavaMistralConfig
    model_class = LlavaMistralModel

    def __init__(self, config):
        if config.sliding_window is not None:
            raise ValueError(
                f"sliding_window ({config.sliding_window}) is not supported: "
                "set it to null in config.json"
            )
        super().__init__(config)


AutoConfig.register(LlavaMistralConfig.model_type, LlavaMistralConfig)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM)
