"""Small checkpoints that tests change: copies, adapters, and how they are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava.model.builder import load_pretrained_model
from tests.golden_data import SHIPPED

CHECKPOINT = SHIPPED / "tiny-llava-v1.5"
NEXT = SHIPPED / "tiny-llava-v1.6"
TOWER = SHIPPED / "tiny-clip-vit-l14-336"


def copy_of(source: Path, folder: Path, weights: bool = False, **config) -> Path:
    """A checkpoint in `folder` with other config values, and no weights unless asked for."""
    folder.mkdir(exist_ok=True, parents=True)
    for path in source.iterdir():
        if weights or ".safetensors" not in path.name:
            shutil.copyfile(path, folder / path.name)
    values = json.loads((folder / "config.json").read_text())
    values |= {"mm_vision_tower": str(TOWER), **config}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def load(folder, base=None, name="tiny-llava", **options):
    return load_pretrained_model(str(folder), base and str(base), name, device="cpu", **options)


def same(model, weights) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def write_adapter(folder, weights, **settings):
    """A LoRA adapter in `folder`; returns the weight it changes and by what (times the scale)."""
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        **settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "model.layers.3.self_attn.q_proj"
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    prefix = f"base_model.model.{name}"
    save_file(
        {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up},
        folder / "adapter_model.safetensors",
    )
    trained = {"base_model.model.model.mm_projector.0.bias": torch.ones(32)}
    torch.save(trained, folder / "non_lora_trainables.bin")
    return weights[f"{name}.weight"], up @ down
