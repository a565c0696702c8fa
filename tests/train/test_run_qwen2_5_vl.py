"""Whole training runs of a small Qwen2.5-VL: it learns, resumes, and writes folders that load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.pruning import build_pruner
from llava.train import train_twigvlm, train_twigvlm_plus
from llava.train.model_setup import FAMILIES
from llava.train.optimizer import parameter_groups
from llava.train.train import prepare
from scripts.merge_lora_weights import merge_lora
from tests.model.checkpoint_tools import load
from tests.paths import ROOT
from tests.ports import free_port
from tests.train.test_train_qwen2_5_vl import (
    CHECKPOINT,
    answers_of,
    command_line,
    losses,
    parameters,
    place,  # noqa: F401
    run,
)

FULL = ["--unfreeze_mm_vision_tower", True]
LORA = ["--lora_enable", True, "--lora_r", 4, "--lora_dropout", 0]


@pytest.fixture(scope="module")
def start():
    return load_file(CHECKPOINT / "model.safetensors")


def changed_parts(trainer, start) -> set[str]:
    """Which of the model's parts are no longer bit by bit as they were."""
    model = trainer.model
    names = {name for name, p in parameters(model).items() if not torch.equal(p, start[name])}
    parts = {"visual.merger": "merger", "visual": "tower", "model": "language model"}
    return {next(parts[part] for part in parts if name.startswith(part)) for name in names}


@pytest.mark.parametrize(
    ("flags", "learned"),
    [
        ([], {"language model", "merger"}),
        (FULL, {"language model", "merger", "tower"}),
        (["--tune_mm_mlp_adapter", True], {"merger"}),
        (["--freeze_mm_mlp_adapter", True], {"language model"}),
        ([*FULL, "--freeze_backbone", True, "--freeze_mm_mlp_adapter", True], {"tower"}),
    ],
    ids=["default", "all", "merger", "language model", "tower"],
)
def test_what_is_not_trained_stays_bit_by_bit(place, tmp_path, start, flags, learned):  # noqa: F811
    assert changed_parts(run(place, tmp_path, *flags), start) == learned


def test_flags_that_leave_nothing_to_train_are_refused(place, tmp_path):  # noqa: F811
    flags = ["--freeze_backbone", True, "--freeze_mm_mlp_adapter", True]
    with pytest.raises(ValueError, match="nothing is left to train"):
        prepare(command_line(place, tmp_path, *flags))


def test_the_loss_falls_and_the_folder_is_one_of_the_release(place, tmp_path):  # noqa: F811
    flags = ["--max_steps", 8, "--group_by_modality_length", True, "--max_pixels", 8 * 784]
    trainer = run(place, tmp_path, *flags, *FULL)
    assert losses(trainer)[-1] < 0.6 * losses(trainer)[0]
    names = {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in CHECKPOINT.iterdir()} <= names
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (CHECKPOINT / name).read_bytes()
    saved, released = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path, CHECKPOINT)
    )
    assert released["vision_config"].items() <= saved["vision_config"].items()
    assert {k: saved[k] for k in released if k != "vision_config"} == {
        k: v for k, v in released.items() if k != "vision_config"
    }
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == load_file(CHECKPOINT / "model.safetensors").keys()  # no tied head
    _, model, processor, _ = load(tmp_path, torch_dtype=torch.float32)
    assert processor.max_pixels == 8 * 784
    assert torch.equal(answers_of(model), answers_of(trainer.model))


def test_an_adapter_loads_onto_its_model_and_merges(place, tmp_path, start):  # noqa: F811
    flags = ["--max_steps", 6, "--max_pixels", 8 * 784]
    trainer = run(place, tmp_path / "lora", *LORA, *flags)
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    adapter = load_file(tmp_path / "lora/adapter_model.safetensors")
    layers = trainer.model.config.num_hidden_layers
    assert len(adapter) == 2 * 7 * layers and not any("visual" in name for name in adapter)
    others = torch.load(tmp_path / "lora/non_lora_trainables.bin", weights_only=True)
    assert others and all("visual.merger." in name for name in others)

    _, model, processor, _ = load(tmp_path / "lora", CHECKPOINT, torch_dtype=torch.float32)
    trained = trainer.model.merge_and_unload()
    logits = answers_of(trained)
    assert processor.max_pixels == 8 * 784
    torch.testing.assert_close(answers_of(model), logits, atol=1e-4, rtol=1e-4)
    assert not torch.equal(model.visual.merger.mlp[0].weight, start["visual.merger.mlp.0.weight"])
    for name, value in others.items():
        assert torch.equal(model.get_parameter(name.removeprefix("base_model.model.")), value)

    merge_lora(str(tmp_path / "lora"), str(CHECKPOINT), str(tmp_path / "merged"))
    _, merged, processor, _ = load(tmp_path / "merged", torch_dtype=torch.float32)
    assert torch.equal(answers_of(merged), answers_of(model)) and processor.max_pixels == 8 * 784


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_are_trained_beside_an_adapter_load_with_it(place, tmp_path, start, bias):  # noqa: F811
    trainer = run(place, tmp_path, *LORA, "--lora_bias", bias, "--max_steps", 2)
    _, model, *_ = load(tmp_path, CHECKPOINT, torch_dtype=torch.float32)
    name = "model.layers.0.self_attn.q_proj.bias"
    assert not torch.equal(model.get_parameter(name), start[name])
    trained = trainer.model.merge_and_unload()
    assert torch.equal(model.get_parameter(name), trained.get_parameter(name))
    torch.testing.assert_close(answers_of(model), answers_of(trained), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("flags", [[*FULL, "--group_by_modality_length", True], LORA])
def test_a_resumed_run_continues_exactly(place, tmp_path, flags):  # noqa: F811
    # Three steps make an epoch.
    flags = [*flags, "--max_steps", 5, "--save_strategy", "steps", "--save_steps", 2]
    whole = run(place, tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole/checkpoint-4", tmp_path / "rest/checkpoint-4")
    rest = run(place, tmp_path / "rest", *flags)
    assert losses(rest) == losses(whole)
    expected = parameters(whole.model)
    assert all(torch.equal(p, expected[name]) for name, p in parameters(rest.model).items())


def test_bfloat16_keeps_float32_where_it_learns(place, tmp_path):  # noqa: F811
    trainer = run(place, tmp_path, "--bf16", True, "--max_steps", 6)
    assert losses(trainer)[-1] < losses(trainer)[0]
    tower = trainer.model.visual
    assert tower.merger.mlp[0].weight.dtype == torch.float32
    assert tower.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    saved = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_parts_have_their_own_learning_rates(place, tmp_path):  # noqa: F811
    rates = ["--mm_projector_lr", 1e-4, "--mm_vision_tower_lr", 1e-5]
    trainer = prepare(command_line(place, tmp_path, *FULL, *rates), "eager")
    assert trainer.model.model.layers[0].self_attn.backend == "eager"
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    found = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            part = "merger" if "merger" in name else "tower" if "visual" in name else ""
            found.setdefault(part, set()).add(group["lr"])
    assert found == {"": {3e-3}, "merger": {1e-4}, "tower": {1e-5}}
    part_of = FAMILIES["qwen2_5_vl"]().part_of
    only_tower = parameter_groups(trainer.model, 0.0, None, 1e-5, part_of)
    slow = {names[id(p)] for group in only_tower if "lr" in group for p in group["params"]}
    assert slow and not any("merger" in name for name in slow)


def test_weights_of_later_versions_of_transformers_are_trained(place, tmp_path, start):  # noqa: F811
    folder = shutil.copytree(CHECKPOINT, tmp_path / "later")
    renamed = {
        f"model.{name}"
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in start.items()
    }
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    top = ("architectures", "model_type", "vision_config", "image_token_id", "video_token_id")
    nested = {key: config[key] for key in top} | {"tie_word_embeddings": True}
    nested["text_config"] = {key: value for key, value in config.items() if key not in top}
    (folder / "config.json").write_text(json.dumps(nested))
    words = ["--model_name_or_path", folder, "--learning_rate", 0, "--max_steps", 1]
    trainer = run(place, tmp_path / "out", *words)
    assert all(torch.equal(p, start[name]) for name, p in parameters(trainer.model).items())
    assert load(tmp_path / "out", torch_dtype=torch.float32)


def test_weights_that_are_missing_are_named(place, tmp_path, start):  # noqa: F811
    folder = shutil.copytree(CHECKPOINT, tmp_path / "model")
    weights = {k: v for k, v in start.items() if k != "visual.blocks.1.norm1.weight"}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights .*visual.blocks.1.norm1.weight"):
        prepare(command_line(place, tmp_path / "out", "--model_name_or_path", folder))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vision_tower", "x"], "--vision_tower has no meaning .* its own vision tower"),
        (["--mm_use_im_start_end", True], "--mm_use_im_start_end has no meaning"),
        (["--version", "v1"], "unknown version 'v1': .* leave the flag out"),
        (["--label_masks", "released"], "--label_masks released: .* LLaVA alone"),
        (["--max_pixels", 100], "min_pixels 3136 and max_pixels 100 leave no size"),
        (["--pruning_method", "cdpruner"], "cdpruner needs"),
    ],
)
def test_flags_of_other_models_are_explained(place, tmp_path, flags, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        prepare(command_line(place, tmp_path, *flags))


def test_a_pruning_method_can_be_trained_with(place, tmp_path):  # noqa: F811
    trainer = run(place, tmp_path, "--pruning_method", "random", "--visual_token_num", 3)
    assert repr(trainer.model.pruner) == repr(build_pruner("random", visual_token_num=3))
    assert len(losses(trainer)) == 3


def test_a_twig_grows_from_it(place, tmp_path):  # noqa: F811
    words = command_line(place, tmp_path, "--twig_K", 0, "--twig_T", 1, "--max_steps", 6)
    trainer = train_twigvlm.train(words)
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    model = load(CHECKPOINT, pruner="twigvlm", twig=str(tmp_path), visual_token_num=10)[1]
    twig = trainer.model.twig.state_dict()
    assert all(torch.equal(p, twig[name]) for name, p in model.pruner_module.state_dict().items())


def test_a_pruning_head_is_distilled_and_reinforced_on_it(place, tmp_path):  # noqa: F811
    first, second = tmp_path / "1", tmp_path / "2"
    flags = ["--stage", 1, "--twig_K", 0, "--twig_T", 1, "--max_steps", 6]
    trainer = train_twigvlm_plus.train(command_line(place, first, *flags))
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    flags = ["--stage", 2, "--twig_path", first, "--num_groups", 3, "--max_steps", 2]
    train_twigvlm_plus.train(command_line(place, second, *flags))
    model = load(CHECKPOINT, pruner="twigvlm_plus", twig=str(second), visual_token_num=10)[1]
    start, end = (load_file(folder / "model.safetensors") for folder in (first, second))
    changed = {name for name in end if not torch.equal(end[name], start[name])}
    assert len(changed) == 2 and all("leaf_attention_module" in name for name in changed)
    assert model.pruner_module.pruning_head.num_heads == model.config.num_attention_heads


@pytest.mark.slow
@pytest.mark.parametrize("flags", [FULL, LORA], ids=["full", "lora"])
def test_two_processes_do_the_work_of_one(place, tmp_path, flags):  # noqa: F811
    # Three steps, some of which give a text to one process and images to the other.
    flags = [*flags, "--optim", "sgd", "--learning_rate", 1e-2, "--max_steps", 3]
    flags += ["--per_device_train_batch_size", 1]
    words = command_line(place, tmp_path / "two", *flags, "--ddp_backend", "gloo")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost"}
    subprocess.run(
        [*launcher, "--master_port", str(free_port()), "-m", "llava.train.train", *words],
        check=True, timeout=1800, cwd=ROOT, env=environment,
    )  # fmt: skip
    one = run(place, tmp_path / "one", *flags, "--gradient_accumulation_steps", 2)
    base = CHECKPOINT if "--lora_enable" in flags else None
    two = load(tmp_path / "two", base, torch_dtype=torch.float32)[1].state_dict()
    alone = load(tmp_path / "one", base, torch_dtype=torch.float32)[1].state_dict()
    assert one.state.global_step == 3
    for name, value in two.items():
        torch.testing.assert_close(value, alone[name], atol=1e-5, rtol=1e-4, msg=name)
