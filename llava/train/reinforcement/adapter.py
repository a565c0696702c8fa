"""The adapter that the reinforcement trains: LoRA on the linear layers of the decoder."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from llava.errors import how_to_install


def with_adapter(
    model: nn.Module,
    rank: int = 32,
    alpha: int = 64,
    dropout: float = 0.05,
    names: Sequence[str] | None = None,
) -> nn.Module:
    """`model` in a PeftModel that trains an adapter on every linear layer of the decoder alone.

    names: of the layers to adapt, such as q_proj; None: all
    Raises ValueError for a name that no layer has.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(f"LoRA needs peft: {how_to_install('train')}") from error
    layers = re.compile(r"model\.layers\.\d+\..*")
    there = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and layers.fullmatch(name)
    }
    wanted = sorted(there) if names is None else list(names)
    if unknown := sorted(set(wanted) - there):
        raise ValueError(
            f"lora_target_modules {', '.join(unknown)}: the decoder has no such layers, only "
            f"{', '.join(sorted(there))}"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=rf"{layers.pattern}\.({'|'.join(wanted)})",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
