"""The decoder of transformers on the weights of ours: what our dense path has to keep up with.

That of Qwen2.5-VL is not in transformers 4.37; Qwen2's does the same work, but its positions are
single numbers: a yardstick of time, with other answers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from llava.eval.efficiency.stopwatch import Stopwatch

#: whether queries have biases -> config, model and rotary tables of transformers
STOCK = {
    False: (LlamaConfig, LlamaForCausalLM, LlamaRotaryEmbedding),
    True: (Qwen2Config, Qwen2ForCausalLM, Qwen2RotaryEmbedding),
}


def stock_decoder(model) -> LlamaForCausalLM | Qwen2ForCausalLM:
    """transformers' decoder with sdpa attention, sharing the weights of `model`."""
    own = model.config
    config_class, model_class, tables = STOCK[bool(getattr(own, "qkv_bias", False))]
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size "
    names += "num_key_value_heads max_position_embeddings rms_norm_eps rope_theta"
    names += " tie_word_embeddings"
    config = config_class(**{name: getattr(own, name) for name in names.split()})
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        stock = model_class(config)
    missing, _ = stock.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert not missing, missing
    for layer in stock.model.layers:  # its tables are no weights
        attention = layer.self_attn
        rotary = tables(attention.head_dim, config.max_position_embeddings, config.rope_theta)
        attention.rotary_emb = rotary.to(model.device, model.dtype)
    return stock.eval()


@torch.no_grad()
def time_stock(stock, embeds: Tensor, num_tokens: int) -> dict[str, float]:
    """Seconds of the prefill of `embeds` (B, S, D) and of every greedy token after the first.

    Like ours, and unlike its `forward`, it computes only the last logits.
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
