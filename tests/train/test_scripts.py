"""The published recipes: known flags, the batch sizes they promise, readable DeepSpeed settings."""

import dataclasses
import json

import pytest
import torch

from llava.model.placement import cpu_multiplies_bfloat16
from llava.train import arguments
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.run import own_precision
from tests.paths import ROOT
from tests.train.recipes import needs_bash, words_of

CLASSES = (ModelArguments, DataArguments, TrainingArguments)
FLAGS = {field.name for cls in CLASSES for field in dataclasses.fields(cls)}
RECIPES = {
    "v1_5/pretrain": {"tune_mm_mlp_adapter": "True", "learning_rate": "1e-3", "version": "plain"},
    "v1_5/finetune": {"image_aspect_ratio": "pad", "learning_rate": "2e-5", "version": "v1"},
    "v1_5/finetune_lora": {"lora_r": "128", "mm_projector_lr": "2e-5", "learning_rate": "2e-4"},
    "qwen2_5_vl/finetune": {"learning_rate": "1e-5", "max_pixels": "1003520"},
    "qwen2_5_vl/finetune_lora": {"lora_r": "64", "model_max_length": "4096"},
}


@needs_bash
@pytest.mark.parametrize("name", [*RECIPES, "v1_5/train_twig", "v1_5/train_glimpse"])
def test_a_recipe_computes_in_the_precision_that_is_asked_for(name):
    (words,) = words_of(f"{name}.sh", BF16="False")
    assert words[words.index("--bf16") + 1] == "False" and words.count("--bf16") == 1


@pytest.mark.slow
@needs_bash
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU decides")
def test_a_recipe_starts_with_what_the_cpu_is_fast_at_and_has():
    (words,) = words_of("v1_5/pretrain.sh", BF16="", TF32="", PROGRAM="")
    assert words[0] == "llava/train/train.py"  # the other one needs flash-attn
    assert words[words.index("--bf16") + 1] == str(cpu_multiplies_bfloat16())
    assert words[words.index("--tf32") + 1] == "False"
    avx2 = {"BF16": "", "PROGRAM": "train_mem.py", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    (slow,) = words_of("v1_5/pretrain.sh", **avx2)
    assert slow[0] == "llava/train/train_mem.py"
    assert slow[slow.index("--bf16") + 1] == "False"


@pytest.mark.parametrize("native", [True, False])
def test_a_cpu_that_is_slow_at_bfloat16_is_named(tmp_path, monkeypatch, caplog, native):
    monkeypatch.setattr(arguments, "cpu_multiplies_bfloat16", lambda: native)
    with own_precision():
        TrainingArguments(str(tmp_path), use_cpu=True)
        assert not caplog.records
        TrainingArguments(str(tmp_path), use_cpu=True, bf16=True)
    assert len(caplog.records) == int(not native)
    assert native or "bfloat16 many times slower than float32" in caplog.text


def test_one_process_needs_no_backend_to_talk_to_others(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with own_precision():
        args = TrainingArguments(str(tmp_path), use_cpu=True, ddp_backend="gloo")
    assert args.world_size == 1


@needs_bash
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_the_trainer_with_known_flags(name):
    ((program, *words),) = words_of(f"{name}.sh", "--max_steps", 7, MODEL="my/model")
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
