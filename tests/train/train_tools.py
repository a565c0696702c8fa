"""What the tests of training start from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.qwen2_5_vl import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from tests.conftest import PROCESSOR, TINY, TOWER
from tests.golden_data import GOLDEN
from tests.paths import GOLDEN as SHIPPED

#: flags for Muon, which torch has from 2.9 on
MUON = ["--matrix_optim", "muon"] if hasattr(torch.optim, "Muon") else []


def write_start(folder: Path, name: str, **config) -> None:
    """A vision tower in folder/tower, and in folder/name a random LLaVA that names it relatively.

    config: values that are not those of the tiny model
    """
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**TOWER)).save_pretrained(folder / "tower")
    (folder / "tower/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    shutil.copytree(GOLDEN / "tiny-llava-v1.5", folder / name, ignore=all_but_the_tokenizer)
    config = {
        **TINY,
        "vocab_size": 700,
        "mm_vision_tower": "../tower",
        "unfreeze_mm_vision_tower": False,
        "mm_use_im_patch_token": False,
        "_name_or_path": str(folder / name),
        **config,
    }
    model = LlavaLlamaForCausalLM(LlavaConfig(**config))
    if hasattr(model.model, "image_newline"):
        model.model.image_newline.data.normal_(std=0.1)
    model.save_pretrained(folder / name)


def all_but_the_tokenizer(_, names):
    return [name for name in names if "token" not in name]


def write_own_grids_start(folder: Path, **config) -> None:
    """In `folder` a random Qwen2.5-VL of 3 layers, with a tower of 4, in the published layout.

    config: values that are not those of the tiny model
    """
    torch.manual_seed(0)
    source = SHIPPED / "tiny-qwen2.5-vl-cut"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model*"))
    values = json.loads((source / "config.json").read_text())
    values |= {"num_hidden_layers": 3, "tie_word_embeddings": False, "initializer_range": 0.05}
    values["vision_config"] |= {"depth": 4, "fullatt_block_indexes": [1, 3]}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**{**values, **config}))
    model.save_pretrained(folder)
    settings = json.loads((source / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(
        json.dumps(settings | {"max_pixels": 20 * 28 * 28})
    )
