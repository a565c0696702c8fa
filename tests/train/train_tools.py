"""What the tests of training start from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from tests.conftest import PROCESSOR, TINY, TOWER
from tests.golden_data import GOLDEN


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
