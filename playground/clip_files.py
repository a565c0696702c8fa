"""The Hugging Face CLIP folder of the playground: tokenizer, configuration and weights."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from playground import scenes

CONTEXT = 77  # positions of the text tower
CAPTION = 12  # ids of a caption, padded with the end mark
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = ("a", "and", "the", "sign", *scenes.COLORS, *scenes.KINDS)


@cache
def byte_characters() -> tuple[str, ...]:
    """The printable character that stands for each byte in byte-level BPE files."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return tuple(table[byte] for byte in [*printable, *others])


@cache
def bpe_tables() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, so that every word of WORDS is one token."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        while len(parts := apply_merges(word, merges)) > 1:
            merges.append((parts[0], parts[1]))
    tokens = [*byte_characters(), *(c + "</w>" for c in byte_characters())]
    tokens += [a + b for a, b in merges] + [START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def apply_merges(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encode one lower-case word of plain letters."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    parts = [*word[:-1], word[-1] + "</w>"]
    while len(parts) > 1:
        pair = min(zip(parts, parts[1:], strict=False), key=lambda p: ranks.get(p, len(ranks)))
        if pair not in ranks:
            break
        parts = _merge(parts, pair)
    return parts


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged, index = [], 0
    while index < len(parts):
        width = 2 if tuple(parts[index : index + 2]) == pair else 1
        merged.append("".join(parts[index : index + width]))
        index += width
    return merged


@cache
def _word_ids(word: str) -> tuple[int, ...]:
    vocabulary, merges = bpe_tables()
    return tuple(vocabulary[part] for part in apply_merges(word, merges))


def phrase_ids(pairs: list[tuple[str, str]]) -> np.ndarray:
    """Ids (12,) of "a red star and a blue ring", with marks, padded with the end mark."""
    vocabulary, _ = bpe_tables()
    text = " and ".join(f"a {color} {kind}" for color, kind in pairs)
    ids = [vocabulary[START], *(i for word in text.split() for i in _word_ids(word))]
    ids.append(vocabulary[END])
    if len(ids) > CAPTION:
        raise ValueError(f"{text!r} takes {len(ids)} ids; at most {CAPTION} are possible")
    return np.array(ids + [vocabulary[END]] * (CAPTION - len(ids)), np.int64)


def save_clip(model, folder: Path) -> None:
    """Write config, weights (bf16), preprocessor and tokenizer of a trained Playground model."""
    tensors = {n: t.to(torch.bfloat16).contiguous() for n, t in clip_state(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "config.json", clip_config(model))
    _write(folder / "preprocessor_config.json", preprocessor_config())
    vocabulary, merges = bpe_tables()
    _write(folder / "vocab.json", vocabulary, indent=None)
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    _write(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT}
    _write(folder / "tokenizer_config.json", special | settings | {"do_lower_case": True})


def clip_state(model) -> dict[str, torch.Tensor]:
    """The weights under the names of transformers' CLIPModel."""
    vision, text = model.tower, model.text
    state = {
        "logit_scale": model.logit_scale,
        "visual_projection.weight": model.visual_projection.weight,
        "text_projection.weight": model.text_projection.weight,
    }
    where = "vision_model.embeddings."
    state[where + "class_embedding"] = vision.class_embedding
    patch = round((vision.patch_embedding.in_features / 3) ** 0.5)
    kernel = vision.patch_embedding.weight.view(-1, 3, patch, patch)
    state[where + "patch_embedding.weight"] = kernel
    state[where + "position_embedding.weight"] = vision.position_embedding
    where = "text_model.embeddings."
    state[where + "token_embedding.weight"] = text.token_embedding.weight
    state[where + "position_embedding.weight"] = text.position_embedding
    for name in ("pre_layrnorm", "post_layernorm"):
        _add(state, f"vision_model.{name}", getattr(vision, name))
    _add(state, "text_model.final_layer_norm", text.final_layer_norm)
    for root, tower in (("vision_model", vision), ("text_model", text)):
        for index, layer in enumerate(tower.layers):
            _add_layer(state, f"{root}.encoder.layers.{index}", layer)
    return {name: tensor.detach() for name, tensor in state.items()}


def _add_layer(state: dict, prefix: str, layer) -> None:
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        _add(state, f"{prefix}.self_attn.{name}", getattr(layer, name))
    for name in ("fc1", "fc2"):
        _add(state, f"{prefix}.mlp.{name}", getattr(layer, name))
    for name in ("layer_norm1", "layer_norm2"):
        _add(state, f"{prefix}.{name}", getattr(layer, name))


def _add(state: dict, name: str, module) -> None:
    state[name + ".weight"] = module.weight
    state[name + ".bias"] = module.bias


def clip_config(model) -> dict:
    """config.json of a full CLIPModel."""
    vocabulary, _ = bpe_tables()
    common = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    projection = model.visual_projection.out_features
    text = {
        "model_type": "clip_text_model",
        "vocab_size": len(vocabulary),
        "bos_token_id": vocabulary[START],
        "eos_token_id": vocabulary[END],
        "pad_token_id": vocabulary[END],
        "max_position_embeddings": CONTEXT,
        "projection_dim": projection,
    }
    vision = {
        "model_type": "clip_vision_model",
        "image_size": scenes.IMAGE_SIZE,
        "patch_size": round((model.tower.patch_embedding.in_features / 3) ** 0.5),
        "projection_dim": projection,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": projection,
        "logit_scale_init_value": 2.6592,
        "torch_dtype": "bfloat16",
        "text_config": common | text | _shape(model.text),
        "vision_config": common | vision | _shape(model.tower),
    }


def _shape(tower) -> dict:
    layer = tower.layers[0]
    return {
        "hidden_size": layer.fc1.in_features,
        "intermediate_size": layer.fc1.out_features,
        "num_attention_heads": layer.heads,
        "num_hidden_layers": len(tower.layers),
    }


def preprocessor_config() -> dict:
    """The image processor of CLIP at 336 px."""
    size = scenes.IMAGE_SIZE
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "CLIPImageProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def _write(path: Path, value: dict, indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
