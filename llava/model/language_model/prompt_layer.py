"""Layers of the decoder on prompts, compiled.

Nothing in the graph but the sizes of tensors changes from prompt to prompt and from layer to layer,
and sizes are symbols: so one graph serves all layers and lengths, whatever a method drops between
them. (A single row and several are two graphs, and so are prompts with a mask and without.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kv_cache import KVCache
from .compiled_step import runs_on
from .compiling import compiled
from .layers import DecoderLayer, Step


def is_able(layer: DecoderLayer, x: Tensor, step: Step, cache: KVCache | None) -> bool:
    """Whether `run_compiled` can do what `layer(x, step, cache)` does. It cannot record rows of
    attention, continue what the cache holds, or leave gradients; FlashAttention it leaves alone,
    and layers under hooks."""
    attention = layer.self_attn
    if step.rows is not None or attention.backend == "flash_attention_2":
        return False
    if cache is not None:
        number = attention.layer_idx
        if cache.lengths[number] or cache.shared[number] is not None:
            return False
    return not torch.is_grad_enabled() and runs_on(layer, x)


def run_compiled(
    layer: DecoderLayer, x: Tensor, step: Step, cache: KVCache | None
) -> tuple[Tensor, Tensor | None]:
    """As `layer(x, step, cache)`."""
    x, keys, values = compiled(on_prompt)(layer, x.contiguous(), step.rope, step.mask, step.tail)
    if cache is not None:
        cache.append(layer.self_attn.layer_idx, keys, values)
    return x, keys if step.form == "keys" else None


# --- what is compiled -----------------------------------------------------------------------


class Kept:
    """An empty cache of one layer, which keeps what is appended."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values

    def shared_by(self, layer: int) -> None:
        return None


def on_prompt(
    layer: DecoderLayer,
    x: Tensor,
    rope: tuple[Tensor, Tensor],
    mask: Tensor | None,
    tail: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer gives on x (B, S, D), and its keys and values (B, G, S, d); the rest is as in
    `Step`."""
    kept = Kept()
    x, _ = layer(x, Step(rope, mask, tail=tail), kept)
    return x, kept.keys, kept.values
