"""The published recipes: known flags, the batch sizes they promise, readable DeepSpeed settings."""

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments

ROOT = Path(__file__).parents[1]
CLASSES = (ModelArguments, DataArguments, TrainingArguments)
FLAGS = {field.name for cls in CLASSES for field in dataclasses.fields(cls)}
RECIPES = {
    "pretrain": {"tune_mm_mlp_adapter": "True", "learning_rate": "1e-3", "version": "plain"},
    "finetune": {"image_aspect_ratio": "pad", "learning_rate": "2e-5", "version": "v1"},
    "finetune_lora": {"lora_r": "128", "mm_projector_lr": "2e-5", "learning_rate": "2e-4"},
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_the_trainer_with_known_flags(name):
    environment = {**os.environ, "LAUNCHER": "echo", "MODEL": "my/model"}
    script = [str(ROOT / f"scripts/v1_5/{name}.sh"), "--max_steps", "7"]
    output = subprocess.run(["bash", *script], env=environment, capture_output=True, text=True)
    program, *words = output.stdout.split()
    assert (ROOT / program).exists()
    values = {k.removeprefix("--"): v for k, v in zip(words[::2], words[1::2], strict=True)}
    assert set(values) <= FLAGS
    assert values["model_name_or_path"] == "my/model" and values["max_steps"] == "7"
    assert RECIPES[name].items() <= values.items()
    assert (ROOT / values["deepspeed"]).exists()


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_deepspeed_settings_follow_the_trainer(name, stage):
    settings = json.loads((ROOT / f"scripts/{name}.json").read_text())
    assert settings["zero_optimization"]["stage"] == stage
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        assert settings[key] == "auto"
