"""Tiny random LLaVA models, built in memory: 6 x 6 patches, 4 tower layers, 6 decoder layers."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import (
    LlavaConfig,
    LlavaLlamaForCausalLM,
    LlavaMistralConfig,
    LlavaMistralForCausalLM,
)
from llava.pruning import build_pruner
from llava.pruning.base import option_names
from tests.paths import GOLDEN

SIDE, PATCH = 84, 14
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
TINY = dict(
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
TOWER = dict(
    model_type="clip_vision_model",
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=3,
    image_size=SIDE,
    patch_size=PATCH,
)
#: beside the tower, for methods that read the question
TEXT_TOWER = dict(
    model_type="clip_text_model",
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=765,
    bos_token_id=763,
    eos_token_id=764,
)
PROCESSOR = dict(
    crop_size={"height": SIDE, "width": SIDE},
    size={"shortest_edge": SIDE},
    image_mean=[0.48145466, 0.4578275, 0.40821073],
    image_std=[0.26862954, 0.26130258, 0.27577711],
    image_processor_type="CLIPImageProcessor",
)


@pytest.fixture(scope="session")
def tower_dir(tmp_path_factory):
    """A full CLIP folder with random weights and the tokenizer of the recorded cases."""
    folder = tmp_path_factory.mktemp("tower")
    width = {"projection_dim": 20}
    config = CLIPConfig(vision_config=TOWER | width, text_config=TEXT_TOWER | width, **width)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / "tiny-clip-vit-l14-336" / name, folder)
    return str(folder)


@pytest.fixture(scope="session")
def make_model(tower_dir):
    """make_model(mistral=False, **config) -> a random model in eval mode."""

    def make(mistral: bool = False, **config):
        torch.manual_seed(0)
        config = {**TINY, "mm_vision_tower": tower_dir, **config}
        if mistral:
            config = LlavaMistralConfig(num_key_value_heads=2, sliding_window=None, **config)
            model = LlavaMistralForCausalLM(config)
        else:
            model = LlavaLlamaForCausalLM(LlavaConfig(**config))
        if hasattr(model.model, "image_newline"):
            model.model.image_newline.data.normal_()
        return model.eval()

    return make


@pytest.fixture(scope="session")
def shared_model(make_model):
    return make_model()


@pytest.fixture(scope="session")
def shared_anyres_model(make_model):
    return make_model(
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=PINPOINTS,
    )


@pytest.fixture
def model(shared_model):
    shared_model.pruner = build_pruner("none")
    return shared_model


@pytest.fixture
def anyres_model(shared_anyres_model):
    shared_anyres_model.pruner = build_pruner("none")
    return shared_anyres_model


@pytest.fixture
def sample():
    """sample(*pieces, seed=0): ids (1, L) of a prompt, images (n, 3, S, S).

    A piece is a number of random text tokens or "image".
    """

    def build(*pieces, seed=0):
        generator = torch.Generator().manual_seed(seed)
        ids = [torch.tensor([1])]
        count = 0
        for piece in pieces:
            if piece == "image":
                ids.append(torch.tensor([IMAGE_TOKEN_INDEX]))
                count += 1
            else:
                ids.append(torch.randint(3, 90, (piece,), generator=generator))
        images = torch.randn(count, 3, SIDE, SIDE, generator=generator) if count else None
        return SimpleNamespace(ids=torch.cat(ids)[None], images=images)

    return build


#: methods that cannot go lower on the tiny model
LEAST_BUDGET = {"twigvlm": 6}


def make_pruner(name: str, visual_token_num: int = 10):
    """A method with a small budget; methods without one as they are."""
    from llava.pruning import METHODS

    if "+" in name:  # the first leaves more than the second where the budget is small
        first, second = name.split("+")
        budgets = {first: max(visual_token_num, 30), second: visual_token_num}
        return build_pruner(name, **{f"{m}_visual_token_num": n for m, n in budgets.items()})
    if visual_token_num > 0:
        visual_token_num = max(visual_token_num, LEAST_BUDGET.get(name, 0))
    options = option_names(METHODS[name])
    takes_budget = "visual_token_num" in options and not build_pruner(name).adaptive
    budget = {"visual_token_num": visual_token_num} if takes_budget else {}
    return with_random_parts(build_pruner(name, **budget))


def with_random_parts(pruner):
    """`pruner`, which makes random weights for itself where it finds no trained ones."""
    load = pruner.attach_model

    def attach_model(model):
        try:
            load(model)
        except FileNotFoundError:
            torch.manual_seed(0)
            pruner.use_random_parts(model)
            load(model)

    pruner.attach_model = attach_model
    return pruner


def pad_batch(rows, side="left"):
    """ids (B, L) and attention mask of several (1, L) prompts."""
    longest = max(row.shape[1] for row in rows)
    ids, masks = [], []
    for row in rows:
        missing = longest - row.shape[1]
        blank, ones = torch.zeros(1, missing, dtype=torch.long), torch.ones_like(row)
        parts = ([blank, row], [blank, ones]) if side == "left" else ([row, blank], [ones, blank])
        ids.append(torch.cat(parts[0], dim=1))
        masks.append(torch.cat(parts[1], dim=1))
    return torch.cat(ids), torch.cat(masks)
