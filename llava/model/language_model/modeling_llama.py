"""The decoder of LLaVA: Llama and Mistral layers with one hook between them.

What sets it apart from the stock implementation: RoPE at explicit positions (gaps are legal),
caches whose length differs per layer, rows of a batch with different numbers of tokens, single
attention rows on request beside SDPA or FlashAttention, and a call to the pruning method before
every layer of a prefill that holds an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...blocks import RMSNorm
from ...devices import device_of, moved
from ...pruning.cost import DecoderShape
from ...pruning.ops import gather_tokens, hides_tokens
from ...pruning.prefill import Prefill
from ...pruning.required import required
from ...pruning.stages import DecoderStage
from ..kv_cache import KVCache, RowState
from ..position_bias import Directions, between, joined
from ..reuse import Prefix
from ..visuals import Visuals
from .attention import (
    Packing,
    attention_mask,
    bias_among,
    branch_mask,
    causal_mask,
    check_backend,
    packs_rows,
    padded_causal_mask,
    rows_of,
    say_no_bias,
)
from .decode_step import DecodeStep
from .layers import DecoderLayer, Rotary, Step, bring, run_layers
from .prefill_loop import PrefillLoop
from .prompt_layer import is_able, run_compiled


@dataclass
class DecoderOutput:
    """What leaves the last layer.

    hidden_states:     (B, S', D) after the final norm, or of the last tokens where those are asked
                       for
    index:             (B, S') place of each token in the prompt; None: nothing was removed
    valid:             (B, S') as in `Prefill`
    all_hidden_states: input of every layer and the final output, when asked for
    """

    hidden_states: Tensor
    index: Tensor | None
    valid: Tensor | None
    all_hidden_states: tuple[Tensor, ...] | None

    @property
    def last_hidden_state(self) -> Tensor:
        """`hidden_states`, as transformers calls it."""
        return self.hidden_states


class LlamaPreTrainedModel(PreTrainedModel):
    """Ties the decoder to transformers' saving, loading and initialisation."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "CLIPVisionTower", "CLIPVisionTowerS2"]
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

    embed_tokens: nn.Module
    layers: Any  # a ModuleList, whose type does not say that it holds `DecoderLayer`s

    def __init__(self, config):
        super().__init__(config)
        check_backend(config._attn_implementation)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)
        self.step = DecodeStep(self.rotary, config._attn_implementation)
        self.compile_layers = False  # those on prompts; `step` is about decoding
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
        visuals: Visuals | None = None,
        cache: KVCache | None = None,
        stage: DecoderStage | None = None,
        trace=None,
        output_hidden_states: bool = False,
        prefix: Prefix | None = None,
        asked: Callable[[], int] | None = None,
    ) -> DecoderOutput:
        """Runs all layers on `inputs_embeds` (B, S, D).

        With an empty cache, or none, this is a prefill: `attention_mask` (B, S) marks tokens,
        `visuals` says where the images are, and `stage` is called between layers. With a filled
        cache the tokens continue its rows. What is known of the prompts in `prefix` is not computed
        again; when it went through all layers, only what follows it comes out.

        asked: gives how many of the last hidden states are asked for, once all layers but the last
        have run. A prefill then gives those alone, and its other tokens end with their keys and
        values in the last layer, where that need not run as a whole.
        """
        if not inputs_embeds.is_floating_point():
            raise ValueError(
                "the decoder takes embeddings (B, S, D), not ids: call the whole model, or give it "
                "model.get_input_embeddings()(input_ids)"
            )
        collect: list[Tensor] | None = [] if output_hidden_states else None
        if cache is not None and len(cache):
            x = self.step(self.layers, inputs_embeds, cache, collect, trace)
            index = valid = None
        else:
            prefill = self.start(inputs_embeds, attention_mask, position_ids, visuals)
            if trace is not None:
                shape = DecoderShape.from_config(self.config, inputs_embeds.element_size())
                trace.start_prefill(shape, prefill.position_ids)
            loop = PrefillLoop(self, stage, cache, trace, collect, asked)
            prefill = loop.run(prefill, prefix)
            x, valid = prefill.hidden_states, prefill.valid
            x = x if asked is None else x[:, -asked() :].contiguous()
            index = prefill.index if loop.dropped else None
        x = self.norm(x.to(device_of(self.norm)))
        index, valid = moved((index, valid), x.device)
        if collect is not None:
            collect.append(x)
        return DecoderOutput(x, index, valid, tuple(collect) if collect is not None else None)

    def start(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        visuals: Visuals | None = None,
    ) -> Prefill:
        """A prefill of x (B, S, D); visuals: None where all is text."""
        visuals = Visuals.none(x) if visuals is None else visuals
        counts = visuals.counts
        batch, size, _ = x.shape
        if attention_mask is not None and attention_mask.shape != (batch, size):
            raise ValueError(
                f"attention_mask {tuple(attention_mask.shape)} must be one for each of the tokens "
                f"of the prompts, {(batch, size)}"
            )
        valid = None
        if attention_mask is not None:
            padded = not attention_mask.all() if counts is None else min(counts.lengths) < size
            valid = attention_mask.bool().to(x.device) if padded else None
        index = torch.arange(size, device=x.device).expand(batch, -1)
        position_bias, asking = visuals.shared_bias()
        if position_ids is None:
            position_ids = index if valid is None else (valid.long().cumsum(1) - 1).clamp(min=0)
        prefill = Prefill(
            decoder=self,
            layer=0,
            hidden_states=x,
            position_ids=position_ids.to(x.device).expand(batch, *position_ids.shape[1:]),
            visual_index=visuals.visual_index,
            patch_index=visuals.patch_index,
            index=index,
            valid=valid,
            extras=visuals.extras,
            image_extras=visuals.image_extras,
            position_bias=position_bias,
            asking=asking,
        )
        if counts is not None:
            prefill.num_images = len(counts.images[0])
            prefill.know(counts, hides=counts.left, left=counts.left)
        return prefill

    def first_layers(
        self, prefill: Prefill, depth: int, cache: KVCache | None, prefix: Prefix | None = None
    ) -> Tensor:
        """(B, S, D) tokens of a prompt as they enter layer `depth` when no method acts before it;
        with `prefix` those that follow it."""
        known = 0 if prefix is None else prefix.size
        x, valid = prefill.hidden_states[:, known:], prefill.valid
        if prefix is None or not prefix.shared:
            bias = self.attention_bias(prefill, first=known)
        else:
            bias = prefix.bias_in_cache(prefill.key_bias)
        if prefix is not None:
            valid = prefix.valid_in_cache(valid)
        hides = prefill.hides_padding if prefix is None else hides_tokens(valid)
        mask = padded_causal_mask(valid, x.shape[1]) if hides and valid is not None else None
        if mask is None and bias is None and prefix is not None and known:
            # Else every layer would make it.
            keys = x.shape[1] + (0 if prefix.shared else known)
            mask = causal_mask(x.shape[1], keys, x.device)
        mask = attention_mask(mask, bias, x.shape[1], x.dtype)
        step = Step(self.rotary(prefill.position_ids[:, known:], x.dtype), mask)
        for number in range(depth):
            if prefix is not None and known:
                prefix.put(number, required(cache, "a prefix needs a cache"), x.shape[0])
            x, step = bring(self.layers[number], x, step)
            x, _ = self.run_layer(self.layers[number], x, step, cache)
        return x

    def prefill_step(self, prefill: Prefill) -> Step:
        """What the layers share on the tokens as they are now."""
        valid, x, directions = prefill.valid, prefill.hidden_states, self.directions(prefill)
        bias, mask, packed = self.attention_bias(prefill, known=directions), None, None
        if bias is not None and self.config._attn_implementation == "flash_attention_2":
            say_no_bias()
        own, tail = slice(x.shape[1]), None  # the tokens before the nodes of a tree
        if (branches := prefill.branches) is not None:
            own = slice(x.shape[1] - len(branches))
            of_nodes = bias_among(bias, slice(own.stop, None), slice(None))
            visible = branches.visible.to(x.device)
            tail = branch_mask(visible, x.shape[1], valid, of_nodes, x.dtype)
        if valid is not None and prefill.hides_padding:
            packs = packs_rows(self.config._attn_implementation)
            if packs and bias is None and branches is None:
                packed = Packing.of(valid, prefill.counts.lengths)
            else:
                mask = padded_causal_mask(valid[:, own], own.stop)
        return Step(
            rope=self.rotary(prefill.position_ids, x.dtype),
            mask=attention_mask(mask, bias_among(bias, own, own), own.stop, x.dtype),
            packed=packed,
            valid=valid,
            bias=bias,
            state=self.row_state(prefill, directions),
            tail=tail,
        )

    def row_state(self, prefill: Prefill, directions: Tensor | None) -> RowState:
        """What caches of layers that run on the tokens as they are now have to know of them."""
        of_keys, of_pairs, asking = prefill.key_bias, None, prefill.asking
        bias = prefill.position_bias
        if directions is not None and bias is not None and bias.answers:
            asking = None if asking is None else asking[:, :1]
            if prefill.branches is not None:  # where these stand holds for the first step alone
                directions = directions[:, : -len(prefill.branches)]
            of_pairs = Directions(bias, directions, asking)
        size = prefill.index.shape[1]
        return RowState(prefill.follows, size, prefill.valid, of_keys, of_pairs)

    def directions(self, prefill: Prefill) -> Tensor | None:
        """(B, S, d) `Rotary.directions` of the tokens; None where no bias asks for them."""
        if prefill.position_bias is None:
            return None
        return self.rotary.directions(prefill.position_ids)

    def attention_bias(
        self,
        prefill: Prefill,
        rows: Tensor | None = None,
        first: int = 0,
        known: Tensor | None = None,
    ) -> Tensor | None:
        """What is added to attention among the tokens as they are now, as in `attention_mask`: the
        queries are those at `rows` (B, R) or, where that is None, those from `first` on.

        known: what `directions` gives, if somebody asked already
        """
        keys, asking = self.directions(prefill) if known is None else known, prefill.asking
        if keys is None or prefill.position_bias is None:
            return prefill.key_bias
        queries = keys[:, first:] if rows is None else gather_tokens(keys, rows)
        if asking is not None:
            asking = asking[:, first:] if rows is None else asking.gather(1, rows)
        of_pairs = between(prefill.position_bias, queries, keys, asking)
        return joined(prefill.key_bias, of_pairs)

    def final_norm(self, x: Tensor) -> Tensor:
        """x (..., D) through the norm behind the last layer, on the device of x."""
        return self.norm(x.to(device_of(self.norm))).to(x.device)

    def through(self, prefill: Prefill, layers: nn.ModuleList) -> Tensor:
        """(B, S, D) what further layers give on the tokens as they are now, on their device."""
        return run_layers(layers, prefill.hidden_states, self.prefill_step(prefill), None)

    def branch(
        self, prefill: Prefill, layers: nn.ModuleList, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Further layers on the tokens as they are now, beside the decoder's own.

        Returns what the last of `layers` gives at the last prompt token, (B, 1, D) before any norm
        and on its device, and what that token attends to there, (B, H, 1, S) in fp32. With a cache,
        which must hold nothing of these layers yet, their keys and values are kept. Leaves what
        entered the last of `layers` in `prefill.drafter_input`.
        """
        own: Any = layers
        x, step = prefill.hidden_states, self.prefill_step(prefill)
        if cache is not None:
            for layer in own:
                cache.rows[layer.self_attn.layer_idx] = step.state
        x = run_layers(own[:-1], x, step, cache)
        x, step = bring(own[-1], x, step)
        prefill.drafter_input = x
        hidden, row = own[-1].at_rows(x, step, prefill.last[:, None].to(x.device), cache)
        return hidden, row.to(prefill.hidden_states.device)

    def branch_attention(self, prefill: Prefill, layers: nn.ModuleList) -> Tensor:
        """(B, H, 1, S) fp32 what the last prompt token attends to in the last of further layers, as
        in `branch`, where nobody wants what comes out of them."""
        own: Any = layers
        step = self.prefill_step(prefill)
        x = run_layers(own[:-1], prefill.hidden_states, step, None)
        x, step = bring(own[-1], x, step)
        row = own[-1].attention_at(x, step, prefill.last[:, None].to(x.device))
        return row.to(prefill.hidden_states.device)

    def attention_rows(
        self,
        layer: int,
        x: Tensor,
        position_ids: Tensor,
        rows: Tensor,
        valid: Tensor | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """(B, H, R, S) fp32 attention rows that `layer` would have on inputs x (B, S, D); bias as
        `attention_bias` gives it for `rows` (B, R)."""
        home, there = x.device, self.layers[layer].device
        if home != there:
            given = x, position_ids, rows, valid, bias
            x, position_ids, rows, valid, bias = moved(given, there)
        norm, attention = self.layers[layer].input_layernorm, self.layers[layer].self_attn
        x = norm(x)
        rope = self.rotary(position_ids, x.dtype)
        k = attention.keys(x, rope)
        cos, sin = (gather_tokens(part[:, 0], rows)[:, None] for part in rope)
        q = attention.queries(gather_tokens(x, rows), (cos, sin))
        return rows_of(q, k, rows, valid, bias=bias).to(home)

    def layer_keys(self, layer: int, x: Tensor, position_ids: Tensor) -> Tensor:
        """(B, G, S, d) keys after RoPE that `layer` would make of inputs x (B, S, D)."""
        home, part = x.device, self.layers[layer]
        x, position_ids = moved((x, position_ids), part.device)
        x = part.input_layernorm(x)
        return part.self_attn.keys(x, self.rotary(position_ids, x.dtype)).to(home)

    def run_layer(
        self, layer: DecoderLayer, x: Tensor, step: Step, cache: KVCache | None
    ) -> tuple[Tensor, Tensor | None]:
        """As `layer(x, step, cache)`, compiled where that is wanted, and with checkpoints for the
        gradients where training asks."""
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(layer.__call__, x, step, cache)
        if self.compile_layers and is_able(layer, x, step, cache):
            return run_compiled(layer, x, step, cache)
        return layer(x, step, cache)
