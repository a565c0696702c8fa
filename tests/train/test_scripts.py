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
from tests.train.recipes import needs_bash, run_recipe, words_of

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


def value_of(words, flag):
    return words[words.index(flag) + 1]


@needs_bash
def test_paths_of_a_recipe_are_meant_as_seen_from_where_it_is_called(tmp_path):
    (tmp_path / "data.json").touch()
    given = {"DATA": "data.json", "OUTPUT": "new", "MODEL": "owner/model", "folder": tmp_path}
    (words,) = words_of("v1_5/train_twig.sh", **given)
    assert value_of(words, "--data_path") == f"{tmp_path}/data.json"
    assert value_of(words, "--output_dir") == f"{tmp_path}/new"
    assert value_of(words, "--model_name_or_path") == "owner/model"  # no folder: a name on the hub
    assert value_of(words, "--image_folder") == "./playground/data"
    (words,) = words_of("v1_5/train_twig.sh", **given, ZERO=ROOT / "z.json", IMAGES=ROOT)
    assert value_of(words, "--deepspeed") == f"{ROOT}/z.json"
    plus = "qwen2_5_vl/train_glimpse_plus.sh"
    given = {"CHECK": "true", "ADAPTER": "adapter", "folder": tmp_path}
    first, second = words_of(plus, **given)
    assert value_of(first, "--output_dir") == value_of(second, "--adapter_dir")
    assert value_of(first, "--output_dir") == f"{tmp_path}/adapter"


@needs_bash
def test_the_second_stage_of_a_twig_is_named_after_the_first(tmp_path):
    stage, names = "v1_5/train/train_twig++_stage2.sh", {"a/stage1-b": "a/stage2-b"}
    names |= {"stage1/twig/": "stage1/twig-stage2", "stage1/x-stage1": "stage1/x-stage2"}
    for twig, output in names.items():
        (words,) = words_of(stage, TWIG=twig)
        assert value_of(words, "--output_dir") == output


@needs_bash
@pytest.mark.parametrize(
    ("script", "word", "said"),
    [
        ("train_glimpse", "7B", "the size of the model is '7B', choose from 3b, 7b"),
        ("train_glimpse_plus", "3", "the stage is '3', choose from 1, 2; without a number"),
    ],
)
def test_a_size_or_stage_that_there_is_not_starts_nothing(script, word, said):
    done = run_recipe(f"qwen2_5_vl/{script}.sh", word, CHECK="true")
    assert done.returncode == 1 and not done.stdout and f"error: {said}" in done.stderr


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_deepspeed_settings_follow_the_trainer(name, stage):
    settings = json.loads((ROOT / f"scripts/{name}.json").read_text())
    assert settings["zero_optimization"]["stage"] == stage
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        assert settings[key] == "auto"
