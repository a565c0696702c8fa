"""What a prefill costs: floating-point operations and cache bytes, from token counts per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: how operations are counted, see `layer_flops` -> the same in words
FORMULAS = {"exact": "operations, exact", "fastv": "multiply-adds, FastV's formula"}


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Llama-type decoder that its cost depends on.

    bytes_per_value: of a cache entry (2 in half precision)
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    bytes_per_value: int = 2

    @classmethod
    def from_config(cls, config, bytes_per_value: int = 2) -> DecoderShape:
        return cls(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            bytes_per_value=bytes_per_value,
        )

    @property
    def kv_width(self) -> int:
        return self.hidden_size // self.num_heads * self.num_kv_heads


def layer_flops(shape: DecoderShape, tokens: int, formula: str = "exact") -> float:
    """Operations of one decoder layer on a prompt of `tokens` tokens; n = tokens, d = hidden_size,
    m = intermediate_size, k = key/value width (d without grouped queries).

    "exact": 2 operations per multiply-add: 2n(2d^2 + 2dk + 3dm) for the projections and the three
             matrices of the gated MLP, plus 4n^2 d for scores and weighted values. Norms, RoPE,
             softmax and activation (below 1 %) are left out, so is the saving of causal kernels.
    "fastv": 4nd^2 + 2n^2 d + 2ndm, the formula of the FastV paper and most tables after it:
             multiply-adds instead of operations, two MLP matrices, no grouped queries.
    """
    n, d, m, k = tokens, shape.hidden_size, shape.intermediate_size, shape.kv_width
    if formula == "exact":
        return 2 * n * (2 * d * d + 2 * d * k + 3 * d * m) + 4 * n * n * d
    if formula == "fastv":
        return 4 * n * d * d + 2 * n * n * d + 2 * n * d * m
    raise ValueError(f"unknown formula {formula!r}, choose from {', '.join(FORMULAS)}")


def prefill_flops(shape: DecoderShape, tokens: Sequence[int], formula: str = "exact") -> float:
    """Operations of all decoder layers; `tokens[l]` tokens enter layer l, see `layer_flops`."""
    return float(sum(layer_flops(shape, n, formula) for n in tokens))


def decode_flops(
    shape: DecoderShape, entries: Sequence[int], new_tokens: int, formula: str = "exact"
) -> float:
    """Operations of all decoder layers for the tokens of an answer, one after the other: the first
    looks at `entries[l]` tokens in layer l, each of the others at one more. See `layer_flops`.
    """
    rate = {"exact": 4, "fastv": 2}
    alone = layer_flops(shape, 1, formula) - rate[formula] * shape.hidden_size
    seen = (new_tokens * held + new_tokens * (new_tokens - 1) // 2 for held in entries)
    return float(sum(new_tokens * alone + rate[formula] * shape.hidden_size * n for n in seen))


def kv_cache_bytes(shape: DecoderShape, entries: int) -> int:
    """Bytes of `entries` cache entries (one token in one layer): a key and a value per head."""
    return 2 * shape.kv_width * shape.bytes_per_value * entries
