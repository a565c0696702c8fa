"""The decoder of transformers on the weights of ours: what our dense path has to keep up with."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llava.eval.efficiency.stopwatch import Stopwatch
from llava.model import LlavaLlamaForCausalLM


def stock_decoder(model: LlavaLlamaForCausalLM) -> LlamaForCausalLM:
    """transformers' Llama with sdpa attention, sharing the weights of `model`."""
    own = model.config
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size "
    names += "num_key_value_heads max_position_embeddings rms_norm_eps rope_theta"
    config = LlamaConfig(**{name: getattr(own, name) for name in names.split()})
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        stock = LlamaForCausalLM(config)
    missing, _ = stock.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert not missing, missing
    for layer in stock.model.layers:  # its tables are no weights
        attention = layer.self_attn
        rotary = LlamaRotaryEmbedding(
            attention.head_dim, config.max_position_embeddings, config.rope_theta
        )
        attention.rotary_emb = rotary.to(model.device, model.dtype)
    return stock.eval()


@torch.no_grad()
def time_stock(stock: LlamaForCausalLM, embeds: Tensor, num_tokens: int) -> dict[str, float]:
    """Seconds of the prefill of `embeds` (B, S, D) and of every greedy token after the first.

    Like ours, and unlike `LlamaForCausalLM.forward`, it computes only the last logits.
    """
    watch = Stopwatch(embeds.device)
    cache, inputs = None, {"inputs_embeds": embeds}
    for number in range(num_tokens):
        with watch.span("decode" if number else "prefill"):
            out = stock.model(**inputs, past_key_values=cache, use_cache=True)
            logits = stock.lm_head(out.last_hidden_state[:, -1:]).float()
        cache, inputs = out.past_key_values, {"input_ids": logits.argmax(dim=-1)}
    stages = watch.read()
    seconds = {"prefill": stages["prefill"][0]}
    if "decode" in stages:
        seconds["decode"] = sum(stages["decode"]) / len(stages["decode"])
    return seconds
