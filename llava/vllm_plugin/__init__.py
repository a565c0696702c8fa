"""A plug-in for vLLM: LLaVA-1.5 whose images are pruned inside the server.

vLLM finds it by the entry point `vllm.general_plugins` once this package is installed beside it,
and nothing changes until a method is named:

    --hf-overrides '{"pruning": {"method": "vispruner", "visual_token_num": 64}}'

Of the rest of `llava` only what needs torch alone is used here, as vLLM wants another transformers
than the other rooms. `docs/Serving.md` says which methods can go this way.
"""

#: architecture -> the class that takes the place of vLLM's
CLASSES = {
    "LlavaForConditionalGeneration": "llava.vllm_plugin.model:PrunableLlava",
    "LlavaNextForConditionalGeneration": "llava.vllm_plugin.refusal:UnprunedLlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "llava.vllm_plugin.refusal:UnprunedQwen25VL",
}


def register() -> None:
    """Puts our classes in place of vLLM's; called by vLLM in each of its processes."""
    from vllm import ModelRegistry

    for architecture, place in CLASSES.items():
        ModelRegistry.register_model(architecture, place)
