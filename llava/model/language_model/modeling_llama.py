"""The decoder of LLaVA: Llama and Mistral layers with one hook between them.

What sets it apart from the stock implementation: RoPE at explicit positions (gaps are legal),
caches whose length differs per layer, rows of a batch with different numbers of tokens, single
attention rows on request beside SDPA or FlashAttention, and a call to the pruning method before
every layer of a prefill that holds an image.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...pruning.base import Pruner
from ...pruning.cost import DecoderShape
from ...pruning.ops import gather_tokens
from ...pruning.tokens import Prefill
from ...rms_norm import RMSNorm
from ..kv_cache import KVCache, RowState
from ..reuse import Prefix
from .attention import (
    attend,
    attend_behind,
    attention_rows,
    check_backend,
    padded_causal_mask,
    repeat_heads,
    rows_of,
)


class Rotary:
    """Cosines and sines of RoPE at any positions; holds no tensors, so it survives any loading."""

    def __init__(self, config):
        self.width = config.hidden_size // config.num_attention_heads
        self.theta = getattr(config, "rope_theta", 10000.0)
        scaling = getattr(config, "rope_scaling", None) or {"type": "linear", "factor": 1.0}
        if scaling.get("type") != "linear":
            raise ValueError(f"rope_scaling {scaling!r} is not supported, choose type 'linear'")
        self.stretch = float(scaling["factor"])

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (B, S) -> cos, sin, each (B, 1, S, d)."""
        even = torch.arange(0, self.width, 2, device=positions.device).float()
        frequency = 1.0 / self.theta ** (even / self.width)
        angle = (positions[..., None].float() / self.stretch) * frequency
        angle = torch.cat([angle, angle], dim=-1)[:, None]
        return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, H, S, d) turned by the angles of its positions."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@dataclass
class Step:
    """What the layers of one forward pass share.

    rope:  cos and sin of the tokens' positions
    mask:  as in `attend`
    valid: (B, S) as in `Prefill`
    rows:  (B, R) queries whose attention the layer records; None: it records nothing
    form:  what it records of them, see `attention_rows`
    state: what the cache of these layers has to know about the rows
    """

    rope: tuple[Tensor, Tensor]
    mask: Tensor | None = None
    valid: Tensor | None = None
    rows: Tensor | None = None
    form: str = "weights"
    state: RowState | None = None


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
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=bias)

    def queries_and_keys(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """q (B, H, S, d) and k (B, G, S, d) after RoPE, from normed inputs x (B, S, D)."""
        return self.queries(x, rope), self.keys(x, rope)

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        batch, size, _ = x.shape
        q = self.q_proj(x).view(batch, size, self.num_heads, self.head_dim).transpose(1, 2)
        return rotate(q, rope)

    def keys(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        batch, size, _ = x.shape
        k = self.k_proj(x).view(batch, size, self.num_kv_heads, self.head_dim).transpose(1, 2)
        return rotate(k, rope)

    def values(self, x: Tensor) -> Tensor:
        """v (B, G, S, d) from normed inputs x (B, S, D)."""
        batch, size, _ = x.shape
        return self.v_proj(x).view(batch, size, self.num_kv_heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, step: Step, cache: KVCache | None) -> tuple[Tensor, Tensor | None]:
        batch, size, _ = x.shape
        q, k = self.queries_and_keys(x, step.rope)
        v = self.values(x)
        if cache is not None:
            k, v = cache.append(self.layer_idx, k, v)
        row = None
        if step.rows is not None:
            row = attention_rows(q, k, step.rows, step.valid, step.form)
        shared = None if cache is None else cache.shared[self.layer_idx]
        if shared is None:
            out = attend(q, k, v, step.mask, self.backend)
        else:
            out = attend_behind(q, k, v, step.mask, shared)
        return self.o_proj(out.transpose(1, 2).reshape(batch, size, -1)), row


class MLP(nn.Module):
    """Gated MLP (SwiGLU)."""

    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act {config.hidden_act!r} is not supported, choose 'silu'")
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP with residual connections."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, step: Step, cache: KVCache | None) -> tuple[Tensor, Tensor | None]:
        """x (B, S, D) -> the same shape, and the attention rows that `step.rows` asks for."""
        out, row = self.self_attn(self.input_layernorm(x), step, cache)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), row

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
        rope = tuple(gather_tokens(part[:, 0], rows)[:, None] for part in step.rope)
        q = attention.queries(gather_tokens(normed, rows), rope)
        weights = rows_of(q, k, rows, step.valid)
        out = weights.to(v.dtype) @ repeat_heads(v, attention.num_heads)
        out = attention.o_proj(out.transpose(1, 2).flatten(2))
        x = gather_tokens(x, rows) + out
        return x + self.mlp(self.post_attention_layernorm(x)), weights


@dataclass
class DecoderOutput:
    """What leaves the last layer.

    hidden_states:     (B, S', D) after the final norm
    index:             (B, S') place of each token in the prompt; None: nothing was removed
    valid:             (B, S') as in `Prefill`
    all_hidden_states: input of every layer and the final output, when asked for
    """

    hidden_states: Tensor
    index: Tensor | None
    valid: Tensor | None
    all_hidden_states: tuple[Tensor, ...] | None


class LlamaPreTrainedModel(PreTrainedModel):
    """Ties the decoder to transformers' saving, loading and initialisation."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = "past_key_values"
    _supports_flash_attn_2 = True
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(mean=0.0, std=std)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx].zero_()


class LlamaModel(LlamaPreTrainedModel):
    """Embeddings, decoder layers and final norm; parameter names as in published checkpoints."""

    def __init__(self, config):
        super().__init__(config)
        check_backend(config._attn_implementation)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        visual_index: Tensor | None = None,
        patch_index: Tensor | None = None,
        token_tags: Tensor | None = None,
        token_context: Tensor | None = None,
        cache: KVCache | None = None,
        pruner: Pruner | None = None,
        grid: tuple[int, int] | None = None,
        trace=None,
        output_hidden_states: bool = False,
        prefix: Prefix | None = None,
    ) -> DecoderOutput:
        """Runs all layers on `inputs_embeds` (B, S, D).

        With an empty cache, or none, this is a prefill: `attention_mask` (B, S) marks tokens,
        `visual_index`, `patch_index` and `token_tags` say where the images are (see `Prefill`) and
        `pruner` is called between layers, `token_context` being its own. With a filled cache the
        tokens continue its rows. What is known of the prompts in `prefix` is not computed again;
        when it went through all layers, only what follows it comes out.
        """
        collect: list[Tensor] | None = [] if output_hidden_states else None
        if cache is not None and len(cache):
            x = self._continue(inputs_embeds, cache, collect)
            index = valid = None
        else:
            prefill = self.start(inputs_embeds, attention_mask, position_ids)
            prefill.grid, prefill.tags, prefill.context = grid, token_tags, token_context
            if visual_index is not None:
                prefill.visual_index, prefill.patch_index = visual_index, patch_index
            hooks = pruner if visual_index is not None else None
            if trace is not None:
                trace.start_prefill(self._shape(inputs_embeds), prefill.position_ids)
            x, index, valid = self._prefill(prefill, cache, hooks, trace, collect, prefix)
        x = self.norm(x)
        if collect is not None:
            collect.append(x)
        return DecoderOutput(x, index, valid, tuple(collect) if collect is not None else None)

    def start(self, x, attention_mask=None, position_ids=None) -> Prefill:
        """A prefill of text; the caller says where the images are."""
        batch, size, _ = x.shape
        valid = None
        if attention_mask is not None and not attention_mask.all():
            valid = attention_mask.bool()
        index = torch.arange(size, device=x.device).expand(batch, -1)
        if position_ids is None:
            position_ids = index if valid is None else (valid.long().cumsum(1) - 1).clamp(min=0)
        text = torch.full_like(index, -1)
        return Prefill(
            decoder=self,
            layer=0,
            hidden_states=x,
            position_ids=position_ids.expand(batch, -1),
            visual_index=text,
            patch_index=text,
            index=index,
            valid=valid,
            grid=None,
        )

    def _prefill(self, prefill: Prefill, cache, pruner, trace, collect, prefix=None):
        """All layers on the prompt; returns hidden states, surviving index (or None) and valid."""
        probes = set() if pruner is None else set(pruner.probe_layers(len(self.layers)))
        start, visual, step = prefill.index, prefill.visual_index, self._prefill_step(prefill)
        drops = pruner is not None and pruner.drops_from_caches(len(self.layers))
        places = held_places if drops else lambda _: None
        own, held, done = places(prefill), [], 0  # held: per layer, what its cache holds
        if prefix is not None:
            done = prefix.depth
            prefill = self._resume(prefill, cache, pruner, trace, prefix)
            held = [own] * done
        for number, layer in enumerate(self.layers[done:], start=done):
            if pruner is not None:
                before, prefill.layer = prefill, number
                prefill = pruner.before_layer(number, prefill)
                if prefill.index is not before.index:
                    step, own = self._prefill_step(prefill), places(prefill)
                    self._dropped(number, prefill, pruner, held, cache, trace)
            if trace is not None:
                trace.add_layer(prefill.visual_index, prefill.valid, prefill.index)
            if collect is not None:
                collect.append(prefill.hidden_states)
            probing = number in probes
            prefill.hidden_states, prefill.attention = self._run(
                layer,
                prefill.hidden_states,
                replace(step, rows=pruner.probe_rows(prefill), form=pruner.probe_form)
                if probing
                else step,
                cache,
            )
            if cache is not None:
                cache.rows[number] = step.state
                held.append(own)
        if pruner is not None:
            before = prefill
            prefill = pruner.after_layers(prefill)
            if prefill.index is not before.index:
                self._dropped(len(self.layers), prefill, pruner, held, cache, trace)
        if trace is not None:
            trace.finish_prefill(cache, visual, prefill.scratch.get("importance"))
        index = None if prefill.index is start else prefill.index
        return prefill.hidden_states, index, prefill.valid

    def _resume(self, prefill: Prefill, cache, pruner, trace, prefix) -> Prefill:
        """The layers that `prefix` went through, on what follows it; returns the prompt as it
        enters the next layer (what follows alone where there is none)."""
        index = prefill.index
        prefill = pruner.before_layer(0, prefill)
        if prefill.index is not index:
            raise ValueError(
                f"{pruner.name} changes tokens before layer 0, but its reusable_layers says that "
                f"it leaves {prefix.depth} layers alone"
            )
        tail = self.first_layers(prefill, prefix.depth, cache, prefix)
        state = RowState(next_position(prefill), prefix.valid_in_cache(prefill.valid))
        for number in range(prefix.depth):
            cache.rows[number] = state
            if trace is not None:
                trace.add_layer(prefill.visual_index, prefill.valid, index)
        whole = prefix.depth < len(self.layers)
        prefill.hidden_states = prefix.followed_by(tail) if whole else tail
        return prefill

    def first_layers(
        self, prefill: Prefill, depth: int, cache: KVCache, prefix: Prefix | None = None
    ) -> Tensor:
        """(B, S, D) tokens of a prompt as they enter layer `depth` when no method acts before it;
        with `prefix` those that follow it."""
        known = 0 if prefix is None else prefix.size
        x, valid = prefill.hidden_states[:, known:], prefill.valid
        if prefix is not None:
            valid = prefix.valid_in_cache(valid)
        mask = padded_causal_mask(valid, x.shape[1]) if hides_tokens(valid) else None
        step = Step(self.rotary(prefill.position_ids[:, known:], x.dtype), mask)
        for number in range(depth):
            if known:
                prefix.put(number, cache, x.shape[0])
            x, _ = self._run(self.layers[number], x, step, cache)
        return x

    def _dropped(self, number: int, prefill: Prefill, pruner, held, cache, trace) -> None:
        """Makes caches and trace follow a change of the tokens before layer `number`."""
        if cache is not None:
            layers = pruner.pruned_caches(number, len(self.layers))
            drop_from_caches(cache, layers, held, prefill)
        if trace is not None:
            trace.add_change(number, prefill.index, prefill.valid)

    def _prefill_step(self, prefill: Prefill) -> Step:
        valid, x = prefill.valid, prefill.hidden_states
        return Step(
            rope=self.rotary(prefill.position_ids, x.dtype),
            mask=padded_causal_mask(valid, x.shape[1]) if hides_tokens(valid) else None,
            valid=valid,
            state=RowState(next_position(prefill), valid),
        )

    def through(self, prefill: Prefill, layers: nn.ModuleList) -> Tensor:
        """(B, S, D) what further layers give on the tokens as they are now."""
        x, step = prefill.hidden_states, self._prefill_step(prefill)
        for layer in layers:
            x, _ = layer(x, step, None)
        return x

    def branch(
        self, prefill: Prefill, layers: nn.ModuleList, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Further layers on the tokens as they are now, beside the decoder's own.

        Returns what the last of `layers` gives at the last prompt token, (B, 1, D) before any norm,
        and what that token attends to there, (B, H, 1, S) in fp32. With a cache, which must hold
        nothing of these layers yet, their keys and values are kept.
        """
        x, step = prefill.hidden_states, self._prefill_step(prefill)
        for layer in layers[:-1]:
            x, _ = layer(x, step, cache)
        return layers[-1].at_rows(x, step, prefill.last[:, None], cache)

    def attention_rows(
        self, layer: int, x: Tensor, position_ids: Tensor, rows: Tensor, valid: Tensor | None
    ) -> Tensor:
        """(B, H, R, S) fp32 attention rows that `layer` would have on inputs x (B, S, D)."""
        norm, attention = self.layers[layer].input_layernorm, self.layers[layer].self_attn
        x = norm(x)
        k = attention.keys(x, self.rotary(position_ids, x.dtype))
        rope = self.rotary(position_ids.gather(1, rows), x.dtype)
        return rows_of(attention.queries(gather_tokens(x, rows), rope), k, rows, valid)

    def _continue(self, x: Tensor, cache: KVCache, collect) -> Tensor:
        """All layers on the (B, q) tokens that follow those in the cache."""
        count = x.shape[1]
        steps: dict[int, Step] = {}  # layers that hold the same tokens share one
        for number, layer in enumerate(self.layers):
            state = cache.rows[number]
            if id(state) not in steps:
                positions = state.next_position[:, None] + torch.arange(count, device=x.device)
                valid = state.mask(cache.lengths[number] + count)
                mask = None if valid is None else padded_causal_mask(valid, count)
                steps[id(state)] = Step(self.rotary(positions, x.dtype), mask, state=state)
            if collect is not None:
                collect.append(x)
            x, _ = layer(x, steps[id(state)], cache)
        for step in steps.values():
            step.state.next_position = step.state.next_position + count
        return x

    def _run(self, layer, x, step, cache):
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(layer.__call__, x, step, cache)
        return layer(x, step, cache)

    def _shape(self, x: Tensor) -> DecoderShape:
        return DecoderShape.from_config(self.config, x.element_size())


def held_places(prefill: Prefill) -> Tensor:
    """(B, S) place of each token in the prompt that entered layer 0, ascending in every row:
    padding and tokens that were not in the prompt repeat the last token before them."""
    index = prefill.index
    if prefill.valid is not None:
        index = index.masked_fill(~prefill.valid, -1)
    return index.cummax(dim=1).values


def drop_from_caches(
    cache: KVCache, layers: Iterable[int], held: list[Tensor], after: Prefill
) -> None:
    """Takes from layers that already ran what a method dropped later; positions stay.

    held: per layer `held_places` of what its cache holds; layers with the same tokens share it
    """
    orders: dict[int, Tensor] = {}
    states: dict[int, RowState] = {}  # layers that shared a state still do
    for layer in layers:
        own, before = held[layer], cache.rows[layer]
        if id(own) not in orders:
            # Both lists ascend in every row, so a search finds where the survivors were.
            order = torch.searchsorted(own.contiguous(), after.index.contiguous())
            orders[id(own)] = order.clamp(max=own.shape[1] - 1)
        if id(before) not in states:
            follows = after.next_position
            follows = before.next_position if follows is None else follows
            states[id(before)] = RowState(follows, after.valid)
        cache.keep(layer, orders[id(own)], states[id(before)])


def hides_tokens(valid: Tensor | None) -> bool:
    """Whether padding stands before a token; behind all tokens the causal mask hides it anyway."""
    return valid is not None and bool((valid[:, 1:] & ~valid[:, :-1]).any())


def next_position(prefill: Prefill) -> Tensor:
    """(B,) position of the first generated token: one after the last position of the prompt,
    unless the method says otherwise."""
    if prefill.next_position is not None:
        return prefill.next_position
    positions = prefill.position_ids
    if prefill.valid is not None:
        positions = positions.masked_fill(~prefill.valid, -1)
    return positions.amax(dim=1) + 1
