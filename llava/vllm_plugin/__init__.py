"""A plug-in for vLLM: LLaVA-1.5 whose images are pruned inside the server.

vLLM finds it by the entry point `vllm.general_plugins` once this package is installed beside it,
and nothing changes until a method is named:

    --hf-overrides '{"pruning": {"method": "vispruner", "visual_token_num": 64}}'

Of the rest of `llava` only what needs torch alone is used here, as vLLM wants another transformers
than the other rooms. `docs/Serving.md` says which methods can go this way.
"""

ARCHITECTURE = "LlavaForConditionalGeneration"


def register() -> None:
    """Puts our class in place of vLLM's for LLaVA; called by vLLM in each of its processes."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, "llava.vllm_plugin.model:PrunableLlava")
