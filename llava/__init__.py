"""LLaVA with every visual-token-pruning method behind one interface."""

__version__ = "0.2.0"
__all__ = ["LlavaLlamaForCausalLM"]


def __getattr__(name: str):
    # Loaded on first use: programs without a model (scorers, controller) start without torch.
    if name in __all__:
        from llava import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
