"""Layers of the decoder: RoPE at any positions, attention, MLP."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.utils.hooks import RemovableHandle

from ...blocks import GatedMLP, RMSNorm, in_pieces, rope_of, rotate
from ...devices import device_of, moved
from ...linear import Linear
from ...pruning.ops import gather_tokens, split_heads
from ..kv_cache import KVCache, RowState
from .attention import (
    Packing,
    attend,
    attend_behind,
    attend_with_tail,
    attention_rows,
    bias_at,
    rows_of,
)


class Rotary:
    """Cosines and sines of RoPE at any positions; holds no tensors, so it survives any loading.

    `rope_scaling` of type "linear" stretches positions by its factor. That of type "mrope" gives
    every token a position on several axes; each axis turns as many frequencies as `mrope_section`
    says, the first axis those that turn fastest.
    """

    def __init__(self, config):
        self.width = config.hidden_size // config.num_attention_heads
        self.theta = getattr(config, "rope_theta", 10000.0)
        scaling = getattr(config, "rope_scaling", None) or {"type": "linear", "factor": 1.0}
        kind = scaling.get("type")
        if kind not in ("linear", "mrope"):
            raise ValueError(
                f"rope_scaling {scaling!r} is not supported, choose type 'linear' or 'mrope'"
            )
        self.stretch = float(scaling["factor"]) if kind == "linear" else 1.0
        self.sections = scaling["mrope_section"] if kind == "mrope" else ()
        if self.sections and sum(self.sections) != self.width // 2:
            raise ValueError(
                f"mrope_section {self.sections} is about {sum(self.sections)} frequencies, heads "
                f"of width {self.width} have {self.width // 2}"
            )

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (B, S), or (B, S, A) on several axes -> `rope_of`, (B, 1, S, d) each."""
        return rope_of(self.angles(positions)[:, None], dtype)

    def directions(self, positions: Tensor) -> Tensor:
        """(B, S, d) fp32 unit vectors of positions (B, S), or (B, S, A) on several axes: the
        product of two is the mean of the cosines of the angles they are turned apart by."""
        angles = self.angles(positions)
        return torch.cat([angles.cos(), angles.sin()], dim=-1) * (2 / self.width) ** 0.5

    def angles(self, positions: Tensor) -> Tensor:
        """(B, S, d / 2) fp32 radians that pairs of values turn by at positions (B, S), or (B, S, A)
        on several axes."""
        frequency = frequencies(self.width, self.theta, positions.device)
        if positions.ndim == 3:  # (B, S, d / 2), of the axis that turns a frequency
            axes = zip(positions.unbind(dim=2), self.sections, strict=True)
            positions = torch.cat([p[..., None].expand(*p.shape, n) for p, n in axes], dim=-1)
        else:
            positions = positions[..., None]
        positions = positions.float()
        if self.stretch != 1.0:
            positions = positions / self.stretch
        return positions * frequency


def frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """(width / 2,) radians a position that pairs of values turn by."""
    if torch.compiler.is_compiling():  # fused with what uses them
        return _frequencies(width, theta, device)
    return _known_frequencies(width, theta, device)


def _frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    even = torch.arange(0, width, 2, device=device).float()
    return 1.0 / theta ** (even / width)


@lru_cache(maxsize=16)
def _known_frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # they outlive the mode
        return _frequencies(width, theta, device)


@dataclass
class OwnCache:
    """The tokens of one answer, so many of those that a layer runs on, the cache that they go to,
    and their mask as in `attend`."""

    size: int
    cache: KVCache
    mask: Tensor | None


@dataclass
class Step:
    """What the layers of one forward pass share.

    rope:   `rope_of` the tokens' positions
    mask, packed: as in `attend`
    valid:  (B, S) as in `Prefill`
    bias:   of attention, of all tokens, as in `attention_mask`
    rows:   (B, R) queries whose attention the layer records; None: it records nothing
    form:   what it records of them, see `attention_rows`; "keys": the keys of all tokens instead
    state:  what the cache of these layers has to know about the rows
    tail:   (B or 1, 1, T, S) mask of numbers of the last T tokens where these are the nodes of a
            tree; `mask` is about those before them. None: there are no such tokens
    answers: whose the tokens are, one answer behind the other, where each has a cache of its own;
            the cache that a layer is given, `mask` and all else but `rope` are then not read
    last:   so many tokens at the end of each row are wanted of a layer, 0: all; keys and values are
            those of all tokens. Not where rows are recorded or packed, or of several answers
    """

    rope: tuple[Tensor, Tensor]
    mask: Tensor | None = None
    valid: Tensor | None = None
    rows: Tensor | None = None
    form: str = "weights"
    state: RowState | None = None
    packed: Packing | None = None
    bias: Tensor | None = None
    tail: Tensor | None = None
    answers: list[OwnCache] | None = None
    last: int = 0

    def of_last(self, count: int) -> Step:
        """The same for a layer of which the last `count` tokens are wanted, nodes of a tree and the
        token before those among them."""
        nodes = 0 if self.tail is None else self.tail.shape[2]
        mask = None if self.mask is None else self.mask[:, :, nodes - count :]
        return replace(self, mask=mask, last=count)


class Attention(nn.Module):
    """Multi-head attention with grouped queries and RoPE."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        width, self.num_heads = config.hidden_size, config.num_attention_heads
        self.num_kv_heads = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.head_dim = width // self.num_heads
        self.layer_idx = layer_idx
        self.backend = config._attn_implementation
        bias = getattr(config, "attention_bias", False)
        own = bias or getattr(config, "qkv_bias", False)
        self.q_proj = Linear(width, self.num_heads * self.head_dim, bias=own)
        self.k_proj = Linear(width, self.num_kv_heads * self.head_dim, bias=own)
        self.v_proj = Linear(width, self.num_kv_heads * self.head_dim, bias=own)
        self.o_proj = Linear(self.num_heads * self.head_dim, width, bias=bias)

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """q (B, H, S, d) after RoPE, from normed inputs x (B, S, D)."""
        return rotate(split_heads(self.q_proj(x), self.num_heads), rope)

    def keys(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """k (B, G, S, d) after RoPE, from normed inputs x (B, S, D)."""
        return rotate(split_heads(self.k_proj(x), self.num_kv_heads), rope)

    def values(self, x: Tensor) -> Tensor:
        """v (B, G, S, d) from normed inputs x (B, S, D)."""
        return split_heads(self.v_proj(x), self.num_kv_heads)

    def weights_at(self, x: Tensor, k: Tensor, step: Step, rows: Tensor) -> Tensor:
        """(B, H, R, S) fp32 what the tokens at places `rows` (B, R) of normed inputs x (B, S, D)
        attend to, from the keys k of all of them."""
        cos, sin = (gather_tokens(part[:, 0], rows)[:, None] for part in step.rope)
        q = self.queries(gather_tokens(x, rows), (cos, sin))
        return rows_of(q, k, rows, step.valid, bias=bias_at(step.bias, rows))

    def forward(self, x: Tensor, step: Step, cache: KVCache | None) -> tuple[Tensor, Tensor | None]:
        """Normed inputs x (B, S, D) -> the same shape, or that of the last tokens where they alone
        are wanted, and the attention rows or keys that `step` asks for; keys and values of all
        tokens go to the cache."""
        k, v, asking = self.keys(x, step.rope), self.values(x), step.rope
        if step.last:
            x = x[:, -step.last :].contiguous()  # else `Linear` leaves it to torch
            asking = step.rope[0][:, :, -step.last :], step.rope[1][:, :, -step.last :]
        batch, size, _ = x.shape
        q = self.queries(x, asking)
        if step.answers is not None:
            out = self._attend_each(q, k, v, step.answers)
            return self.o_proj(out.transpose(1, 2).reshape(batch, size, -1)), None
        if cache is not None:
            k, v = cache.append(self.layer_idx, k, v)
        row = k if step.form == "keys" else None
        if step.rows is not None:
            row = attention_rows(q, k, step.rows, step.valid, step.form, step.bias)
        shared = None if cache is None else cache.shared_by(self.layer_idx)
        if step.tail is not None:
            out = attend_with_tail(q, k, v, step.mask, step.tail, self.backend)
        elif shared is None:
            out = attend(q, k, v, step.mask, self.backend, step.packed)
        else:
            out = attend_behind(q, k, v, step.mask, shared)
        return self.o_proj(out.transpose(1, 2).reshape(batch, size, -1)), row

    def _attend_each(self, q: Tensor, k: Tensor, v: Tensor, answers: list[OwnCache]) -> Tensor:
        """(1, H, Q, d) attention of tokens to those of their own answer."""
        sizes, out = [own.size for own in answers], []
        parts = (x.split(sizes, dim=2) for x in (q, k, v))
        for own, asking, keys, values in zip(answers, *parts, strict=True):
            keys, values = own.cache.append(self.layer_idx, keys, values)
            out.append(attend(asking, keys, values, own.mask, self.backend))
        return torch.cat(out, dim=2)


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residual connections."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act {config.hidden_act!r} is not supported, choose 'silu'")
        self.self_attn = Attention(config, layer_idx)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def device(self) -> torch.device:
        """Where the layer computes; read before every layer, so nothing but two look-ups."""
        weight = self.input_layernorm.weight
        return device_of(self) if weight.is_meta else weight.device

    def forward(self, x: Tensor, step: Step, cache: KVCache | None) -> tuple[Tensor, Tensor | None]:
        """x (B, S, D) -> the same shape, or that of the last tokens where they alone are wanted,
        and the attention rows or keys that `step` asks for."""
        x, row = self.attend(x, step, cache)
        return self.finish(x), row

    def attend(self, x: Tensor, step: Step, cache: KVCache | None) -> tuple[Tensor, Tensor | None]:
        """The same before `finish`, which any of the tokens may go through without the others."""
        out, row = self.self_attn(self.input_layernorm(x), step, cache)
        return (x[:, -step.last :] if step.last else x) + out, row

    def finish(self, x: Tensor) -> Tensor:
        """x (B, S, D), as `attend` gives it, -> what the layer gives."""
        return in_pieces(self.feed_forward, x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """What follows attention, of tokens x (..., D)."""
        return x + self.mlp(self.post_attention_layernorm(x))

    def at_rows(
        self, x: Tensor, step: Step, rows: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs (B, R, D) at places `rows` (B, R) alone, and the attention (B, H, R, S) there.

        Keys and values of all tokens x (B, S, D) are computed, and kept in an empty `cache`.
        """
        attention, normed = self.self_attn, self.input_layernorm(x)
        k, v = attention.keys(normed, step.rope), attention.values(normed)
        if cache is not None:
            cache.append(attention.layer_idx, k, v)
        weights = attention.weights_at(normed, k, step, rows)
        # The heads of a group read the same values: they are rows of one product.
        grouped = weights.to(v.dtype).unflatten(1, (v.shape[1], -1)).flatten(2, 3)
        out = (grouped @ v).view(*weights.shape[:3], -1)
        out = attention.o_proj(out.transpose(1, 2).flatten(2))
        return self.feed_forward(gather_tokens(x, rows) + out), weights

    def attention_at(self, x: Tensor, step: Step, rows: Tensor) -> Tensor:
        """The attention of `at_rows` alone, for which no values are computed."""
        normed = self.input_layernorm(x)
        keys = self.self_attn.keys(normed, step.rope)
        return self.self_attn.weights_at(normed, keys, step, rows)


def is_watched(layer: nn.Module) -> bool:
    """Whether somebody wants to know when a layer runs, as accelerate does to bring its weights."""
    own = vars(layer)
    replaced = "forward" in own or "_hf_hook" in own
    return bool(replaced or layer._forward_hooks or layer._forward_pre_hooks)


#: layers of which no part was watched when so many hooks had been registered
_unwatched: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def is_watched_inside(layer: nn.Module) -> bool:
    """The same of a layer or any part of it, or of all modules there are: a graph of a layer goes
    past the hooks of its parts that came after it."""
    everywhere = hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks
    if everywhere or is_watched(layer):
        return True
    registered = RemovableHandle.next_id  # counts all hooks that there ever were
    if _unwatched.get(layer) == registered:
        return False
    if any(map(is_watched, layer.modules())):
        return True
    _unwatched[layer] = registered
    return False


def bring(layer: DecoderLayer, x: Tensor, step: Step) -> tuple[Tensor, Step]:
    """Hidden states and `Step` on the device of the layer that is to run on them."""
    device = layer.device
    if x.device != device:
        x = x.to(device)
    if step.rope[0].device != device:
        step = moved(step, device)
    return x, step


def run_layers(layers: Iterable[Any], x: Tensor, step: Step, cache: KVCache | None) -> Tensor:
    """(B, S, D) what `layers` give on x (B, S, D), on the device of the last of them."""
    for layer in layers:
        x, step = bring(layer, x, step)
        x, _ = layer(x, step, cache)
    return x
