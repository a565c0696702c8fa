"""Models of vLLM that the plug-in does not prune: with the override they end the server's start.

Without it they are vLLM's own. An override that did nothing would leave people with an unpruned
server that they take for a pruned one.
"""

from __future__ import annotations

from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from .plan import check_unpruned


class Refusing:
    """Put before a class of vLLM."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        check_unpruned(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class UnprunedLlavaNext(Refusing, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT: how many tokens an image has depends on its size."""


class UnprunedQwen25VL(Refusing, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL: how many tokens an image has depends on its size."""
