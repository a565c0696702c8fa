"""Models of transformers on the weights of ours: what our dense path has to keep up with.

That of Qwen2.5-VL is not in transformers 4.37; Qwen2's does the same work, but its positions are
single numbers: a yardstick of time, with other answers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from llava.eval.efficiency.stopwatch import Stopwatch
from llava.llava_hf import name_there
from llava.pruning import Pruner

#: whether queries have biases -> config, model and rotary tables of transformers
STOCK = {
    False: (LlamaConfig, LlamaForCausalLM, LlamaRotaryEmbedding),
    True: (Qwen2Config, Qwen2ForCausalLM, Qwen2RotaryEmbedding),
}
#: id that marks an image in a prompt of transformers' LLaVA; no text holds it
IMAGE_ID = 1


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


def stock_llava(model) -> LlavaForConditionalGeneration:
    """transformers' LLaVA with sdpa attention in its decoder (its tower knows none), sharing the
    weights of `model`; `IMAGE_ID` stands for an image. Raises ValueError for what it has not."""
    own, tower = model.config, model.get_vision_tower()
    tiled = tower.grid is None or model.crops_in_budget(Pruner()) > 1
    if tiled or own.mm_projector_type != "mlp2x_gelu":
        raise ValueError("transformers' LLaVA is compared with models as LLaVA-1.5: 7b, 1b, 0.6b")
    decoder = stock_decoder(model)
    config = LlavaConfig(
        tower.config.to_dict(),
        decoder.config.to_dict(),
        image_token_index=IMAGE_ID,
        vision_feature_layer=own.mm_vision_select_layer,
    )
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration(config)
        stock.vision_tower = CLIPVisionModel(config.vision_config)
    state = model.state_dict()
    weights = {name_there(name): state[name] for name in state}
    missing, _ = stock.load_state_dict(weights, strict=False, assign=True)
    assert not missing, missing
    stock.language_model = decoder
    embeddings = stock.vision_tower.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=model.device)[None]
    stock.generation_config.pad_token_id = stock.config.pad_token_id = stock.pad_token_id = 0
    stock.generation_config.eos_token_id = None
    return stock.eval()


@torch.no_grad()
def time_stock(stock, embeds: Tensor, num_tokens: int, watch: Stopwatch) -> dict[str, float]:
    """Seconds of the prefill of `embeds` (B, S, D) and of every greedy token after the first.

    Like ours, and unlike its `forward`, it computes only the last logits.
    """
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
