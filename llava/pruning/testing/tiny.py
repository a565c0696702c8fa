"""Tiny random LLaVA models, and prompts for them: 6 x 6 patches, 4 tower layers, 6 decoder layers.

Nothing is downloaded; the vision tower is written to a folder, as one that is loaded has to be.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.tokenization_clip import bytes_to_unicode

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import (
    LlavaConfig,
    LlavaLlamaForCausalLM,
    LlavaMistralConfig,
    LlavaMistralForCausalLM,
)
from llava.model.language_model.qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from llava.model.multimodal_encoder.qwen2_5_vl_videos import Video

from .. import METHODS, Pruner, build_pruner, in_a_row
from ..base import option_names

SIDE, PATCH = 84, 14  # pixels
NUM_PATCHES = (SIDE // PATCH) ** 2
#: what images of a LLaVA-NeXT model may be resized to
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
TINY: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    vocab_size=90,
    max_position_embeddings=2048,
    initializer_range=0.3,
    pad_token_id=0,
    mm_hidden_size=24,
    mm_projector_type="mlp2x_gelu",
    mm_vision_select_layer=-2,
    mm_vision_select_feature="patch",
    unfreeze_mm_vision_tower=True,
    image_aspect_ratio="pad",
)
#: added to `TINY`, what makes a model LLaVA-NeXT
ANYRES: dict[str, Any] = dict(
    image_aspect_ratio="anyres",
    mm_patch_merge_type="spatial_unpad",
    image_grid_pinpoints=PINPOINTS,
)
TOWER = dict(
    model_type="clip_vision_model",
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=3,
    image_size=SIDE,
    patch_size=PATCH,
)
#: characters, those at the end of a word, and two marks: every text is spelled
LETTERS = [
    *(char for char in bytes_to_unicode().values()),
    *(f"{char}</w>" for char in bytes_to_unicode().values()),
    "<|startoftext|>",
    "<|endoftext|>",
]
#: beside the tower, for methods that read the question
TEXT_TOWER = dict(
    model_type="clip_text_model",
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
)
PROCESSOR = dict(
    crop_size={"height": SIDE, "width": SIDE},
    size={"shortest_edge": SIDE},
    image_mean=[0.48145466, 0.4578275, 0.40821073],
    image_std=[0.26862954, 0.26130258, 0.27577711],
    image_processor_type="CLIPImageProcessor",
)


def write_tower(
    folder: str | Path, words: list[str] = LETTERS, merges: str = "", **tower: int
) -> str:
    """Writes a whole CLIP model with random weights and its tokenizer into `folder`.

    words: of the tokenizer, those that begin and end a text last; merges: lines with two words each
    tower: replaces values of `TOWER`
    """
    folder = Path(folder)
    width = {"projection_dim": 20}
    marks = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    text = TEXT_TOWER | width | {"vocab_size": len(words), **marks}
    config = CLIPConfig(vision_config=TOWER | width | tower, text_config=text, **width)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    numbers = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(numbers))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


def make_model(tower: str, mistral: bool = False, **config):
    """A random model in eval mode on the tower in a folder; config: replaces values of `TINY`."""
    torch.manual_seed(0)
    config = {**TINY, "mm_vision_tower": tower, **config}
    if mistral:
        config = LlavaMistralConfig(num_key_value_heads=2, sliding_window=None, **config)
        model = LlavaMistralForCausalLM(config)
    else:
        model = LlavaLlamaForCausalLM(LlavaConfig(**config))
    if hasattr(model.model, "image_newline"):
        model.model.image_newline.data.normal_()
    return model.eval()


#: a model whose images have grids of their own: in place of the values of `TINY`, and its tower
OWN_GRIDS: dict[str, Any] = dict(
    num_key_value_heads=2,
    rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1]},
    vocab_size=92,
    image_token_id=90,
    video_token_id=91,
)
OWN_GRIDS_TOWER: dict[str, Any] = dict(
    depth=4,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    out_hidden_size=TINY["hidden_size"],
    patch_size=2,
    window_size=16,
    fullatt_block_indexes=[1, 3],
)
#: numbers of a patch of such an image
VALUES = 3 * 2 * OWN_GRIDS_TOWER["patch_size"] ** 2


def make_own_grids_model(tower: dict = OWN_GRIDS_TOWER, **config):
    """A random model in eval mode whose images have their own grids, and positions three axes;
    config: replaces values of `TINY`."""
    torch.manual_seed(0)
    config = {**TINY, **OWN_GRIDS, "vision_config": tower, **config}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config)).eval()
    model.lm_head.weight.data[OWN_GRIDS["image_token_id"] :] = 0  # answers hold no marks
    return model


def picture(h: int, w: int, seed: int = 0) -> Tensor:
    """A random image of h x w tokens for such a model."""
    generator = torch.Generator().manual_seed(10000 * seed + 100 * h + w)
    return torch.randn(h, w, 4, VALUES, generator=generator)


def still(h: int, w: int, seed: int = 0) -> Tensor:
    """The same with two equal frames, as an image really has them."""
    frames = picture(h, w, seed).unflatten(-1, (3, 2, -1))
    return frames[..., :1, :].expand_as(frames).flatten(-3)


def video(pairs: int, h: int, w: int, seconds: float = 1.0, seed: int = 0) -> Video:
    """A random video of so many pairs of frames of h x w tokens, each of which lasts `seconds`."""
    return Video(torch.stack([picture(h, w, 100 * seed + n) for n in range(pairs)]), seconds)


@dataclass
class Sample:
    """ids (1, L) of a prompt, images (n, 3, S, S), None without any."""

    ids: Tensor
    images: Tensor | None


def sample(*pieces: int | Literal["image"], seed: int = 0) -> Sample:
    """A random prompt; a piece is a number of text tokens or "image"."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.tensor([1])]
    for piece in pieces:
        if piece == "image":
            ids.append(torch.tensor([IMAGE_TOKEN_INDEX]))
        else:
            ids.append(torch.randint(3, TINY["vocab_size"], (piece,), generator=generator))
    count = pieces.count("image")
    images = torch.randn(count, 3, SIDE, SIDE, generator=generator) if count else None
    return Sample(torch.cat(ids)[None], images)


def pad_batch(rows: list[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    """ids (B, L) and attention mask (B, L) of several (1, L) prompts."""
    longest = max(row.shape[1] for row in rows)
    ids, masks = [], []
    for row in rows:
        missing = longest - row.shape[1]
        blank, ones = torch.zeros(1, missing, dtype=torch.long), torch.ones_like(row)
        parts = ([blank, row], [blank, ones]) if side == "left" else ([row, blank], [ones, blank])
        ids.append(torch.cat(parts[0], dim=1))
        masks.append(torch.cat(parts[1], dim=1))
    return torch.cat(ids), torch.cat(masks)


def make_pruner(name: str, visual_token_num: int = 10, least: int = 1, **options: Any) -> Pruner:
    """A method with a small budget where it takes one, and random weights where it has none.

    least: budget that the method cannot go below; options: further ones of the method, a share of
    tokens among them
    """
    rows = in_a_row(name)
    if len(rows) == 2:  # the first leaves more than the second where the budget is small
        first, second = (row.partition("+")[0] for row in rows)
        budgets = {first: max(visual_token_num, 30), second: visual_token_num}
        options |= {f"{method}_visual_token_num": n for method, n in budgets.items()}
    elif "visual_token_ratio" in options:
        pass
    elif "visual_token_num" in option_names(METHODS.usable(name.partition("+")[0])):
        if not build_pruner(name, **options).adaptive:
            number = max(visual_token_num, least) if visual_token_num > 0 else visual_token_num
            options["visual_token_num"] = number
    return with_random_parts(build_pruner(name, **options))


def with_random_parts(pruner: Pruner) -> Pruner:
    """`pruner`, which makes random weights for itself where it finds no trained ones."""
    load = pruner.attach

    def attach(model) -> None:
        try:
            load(model)
        except FileNotFoundError:
            torch.manual_seed(0)
            pruner.use_random_parts(model)
            load(model)

    pruner.attach = attach  # type: ignore[method-assign] # of this one alone
    return pruner
