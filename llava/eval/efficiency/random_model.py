"""Models of any size with random weights, built in memory: for measuring, not for answers."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig

from llava.checkpoint_kind import OTHER_FAMILIES, family_in, values_in
from llava.config_file import check_config
from llava.llava_hf import CLIP_LARGE
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.checkpoint import model_config
from llava.model.language_model.qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from llava.model.multimodal_encoder.builder import resolve_tower_path
from llava.model.multimodal_encoder.clip_files import read_vision_config
from llava.model.qwen2_5_vl_rules import checked_config
from llava.spelling import unknown

#: decoder sizes: hidden_size, intermediate_size, num_hidden_layers, attention heads, key heads
DECODERS = {
    "small": (512, 1376, 8, 8, 8),
    "0.6b": (1536, 4096, 18, 12, 12),
    "1b": (2048, 5504, 22, 16, 16),
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "mistral-7b": (4096, 14336, 32, 32, 8),
}
#: LLaVA-NeXT cuts an image into an overview and up to four tiles
NEXT = "next-"
CONFIGS = [*(name for name in DECODERS if name != "mistral-7b")]
CONFIGS += [NEXT + name for name in ("1b", "7b", "13b", "mistral-7b")]
#: Qwen2.5-VL: sizes of the decoder, and whether it shares embeddings and head; towers are alike
QWEN = {
    "qwen2.5-vl-3b": (2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-vl-7b": (3584, 18944, 28, 28, 4, 152064, False),
}
CONFIGS += QWEN
POOL_NUMBERS = 2**22 - 1  # odd, so that rows of a weight do not repeat each other


def shapes(
    name: str, layers: int | None = None
) -> tuple[LlavaConfig | Qwen2_5_VLConfig, CLIPVisionConfig | None]:
    """Configs of the model, and of its tower where that has one of its own.

    name:   one of `CONFIGS` (a decoder behind a CLIP-L tower as LLaVA-1.5 or, with "next-",
            LLaVA-NeXT; or Qwen2.5-VL), or a folder with a checkpoint, whose weights are not read
    layers: so many decoder layers in place of all
    """
    config, tower = _shapes(name)
    if layers is not None:
        config.num_hidden_layers = layers
    return config, tower


def _shapes(name: str):
    if name in QWEN:
        width, inner, layers, heads, key_heads, vocabulary, tied = QWEN[name]
        return Qwen2_5_VLConfig(
            vision_config={"out_hidden_size": width},
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
            max_position_embeddings=128000,
            rope_theta=1e6,
        ), None
    if name in CONFIGS:
        width, inner, layers, heads, key_heads = DECODERS[name.removeprefix(NEXT)]
        config = LlavaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            vocab_size=32000,
            max_position_embeddings=4096,
            mm_hidden_size=CLIP_LARGE["hidden_size"],
            mm_projector_type="mlp2x_gelu",
            mm_vision_select_layer=-2,
            mm_vision_select_feature="patch",
            image_aspect_ratio="pad",
        )
        if name.startswith(NEXT):
            side = CLIP_LARGE["image_size"]
            shapes = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
            config.image_aspect_ratio = "anyres"
            config.mm_patch_merge_type = "spatial_unpad"
            config.image_grid_pinpoints = [[side * w, side * h] for w, h in shapes]
        return config, CLIPVisionConfig(**CLIP_LARGE)
    if not os.path.isfile(os.path.join(name, "config.json")):
        known = [*CONFIGS, "playground", "a folder with a checkpoint"]
        raise ValueError(unknown("size", name, known))
    values = values_in(name)
    if family_in(values) in OTHER_FAMILIES:
        return Qwen2_5_VLConfig(**checked_config(values, f"{name}/config.json")), None
    values = check_config(values, f"{name}/config.json")
    config = model_config(LlavaConfig, LlavaLlamaForCausalLM, name, values)
    return config, read_vision_config(resolve_tower_path(config.mm_vision_tower, name))


def build_random_model(
    config: LlavaConfig | Qwen2_5_VLConfig,
    tower: CLIPVisionConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LlavaLlamaForCausalLM | Qwen2_5_VLForConditionalGeneration:
    """A model of these shapes with small random weights; no token ends its answers."""
    model = empty_model(config, tower).to(dtype).to_empty(device=device).eval()
    if config.tie_word_embeddings:
        model.tie_weights()
    fill_randomly(model)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def empty_model(
    config: LlavaConfig | Qwen2_5_VLConfig, tower: CLIPVisionConfig | None = None
) -> LlavaLlamaForCausalLM | Qwen2_5_VLForConditionalGeneration:
    """The modules of a model of these shapes, without memory for their weights."""
    if tower is None:
        with torch.device("meta"):
            return Qwen2_5_VLForConditionalGeneration(config)
    with tempfile.TemporaryDirectory() as folder:
        tower.save_pretrained(folder)
        side = tower.image_size
        CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ).save_pretrained(folder)
        config.mm_vision_tower = folder
        config.unfreeze_mm_vision_tower = True  # the tower is made here, not loaded from files
        with torch.device("meta"):
            return LlavaLlamaForCausalLM(config)


@torch.no_grad()
def fill_randomly(model: nn.Module) -> None:
    """Norm weights 1, biases 0, everything else uniform with a deviation of 0.02."""
    weight = next(model.parameters())
    bound = 0.02 * 3**0.5
    generator = torch.Generator().manual_seed(0)
    pool = torch.rand(POOL_NUMBERS, generator=generator).mul_(2 * bound).sub_(bound)
    pool = pool.to(weight.device, weight.dtype)
    start = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name.endswith(("weight", "bias")):
            parameter.fill_(name.endswith("weight"))
            continue
        start = _copy_cyclic(parameter.view(-1), pool, start)
    for buffer in model.buffers():  # the tower's numbering of its positions
        buffer.copy_(torch.arange(buffer.numel(), device=buffer.device).view(buffer.shape))


def _copy_cyclic(target: torch.Tensor, pool: torch.Tensor, start: int) -> int:
    """Fills `target` from `pool`, read in a circle from `start`; returns where it stopped."""
    done = 0
    while done < target.numel():
        count = min(target.numel() - done, pool.numel() - start)
        target[done : done + count] = pool[start : start + count]
        done, start = done + count, (start + count) % pool.numel()
    return start
