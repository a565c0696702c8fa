"""The language model of a checkpoint in a server of its own (vLLM); all that sees images here."""

from .server import EngineError, RefusedError
from .vllm import VLLMEngine

__all__ = ["EngineError", "RefusedError", "VLLMEngine"]
