"""LLaVA on a Llama decoder."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from ...image_settings import KnowsMethod
from ..llava_arch import LlavaMetaForCausalLM, LlavaMetaModel
from .causal_lm import VisionLanguageForCausalLM
from .modeling_llama import LlamaModel


class LlavaConfig(KnowsMethod, LlamaConfig):
    model_type = "llava_llama"


class LlavaLlamaModel(LlavaMetaModel, LlamaModel):
    """Decoder, vision tower and projector."""

    config_class = LlavaConfig


class LlavaLlamaForCausalLM(LlavaMetaForCausalLM, VisionLanguageForCausalLM):
    """The whole model. `model.pruner` is the pruning method in use, see `llava.pruning`."""

    config_class = LlavaConfig
    model_class: type[LlavaLlamaModel] = LlavaLlamaModel

    def get_model(self) -> LlavaLlamaModel:
        return self.model


AutoConfig.register(LlavaConfig.model_type, LlavaConfig)
AutoModelForCausalLM.register(LlavaConfig, LlavaLlamaForCausalLM)
