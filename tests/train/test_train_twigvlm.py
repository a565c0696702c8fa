"""Training a twig: only it learns, it resumes exactly, and it is written as published."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llava.model import LlavaLlamaForCausalLM
from llava.pruning import build_pruner
from llava.pruning.twigvlm import published_name
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.train_twigvlm import TwigArguments, TwigTraining, train
from tests.paths import ROOT
from tests.ports import free_port
from tests.train.recipes import needs_bash, words_of
from tests.train.test_run import command_line, losses, parameters, workplace  # noqa: F401
from tests.train.train_tools import MUON

TWIG = ["--twig_K", 1, "--twig_T", 1]


def run(place, output, *flags, **options):
    return train(command_line(place, output, *TWIG, *flags), **options)


def test_only_the_twig_learns_and_it_is_written_as_published(workplace):  # noqa: F811
    output = workplace / "twig"
    trainer = run(workplace, output, "--num_train_epochs", 4, "--bf16", True)
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    start = parameters(LlavaLlamaForCausalLM.from_pretrained(workplace / "start").bfloat16())
    trunk = parameters(trainer.model.trunk)
    assert all(torch.equal(trunk[name], start[name]) for name in start)
    tensors = load_file(output / "model.safetensors")
    assert len(tensors) == 9 + 2 and {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert not torch.equal(tensors["lm_head.weight"], start["lm_head.weight"])
    config = json.loads((output / "config.json").read_text())
    assert config == {
        "pruning_method": "twigvlm",
        "base_model": "start",
        "twig_K": 1,
        "twig_T": 1,
        "hidden_size": 32,
        "vocab_size": 700,
        "conv_mode": "vicuna_v1",
    }
    model = LlavaLlamaForCausalLM.from_pretrained(workplace / "start").eval()
    model.pruner = build_pruner("twigvlm", twig=str(output), visual_token_num=20)
    assert model.pruner.shared_layers(2) == 1
    output = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=3, eos_token_id=-1)
    assert output.shape == (1, 3)


@pytest.mark.parametrize("flags", [MUON, ["--bf16", True]])
def test_a_resumed_run_continues_exactly(workplace, tmp_path, flags):  # noqa: F811
    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    flags = [*flags, "--save_strategy", "steps", "--save_steps", 2]
    whole = run(workplace, tmp_path / "whole", *flags)
    run(workplace, tmp_path / "parts", *flags, callbacks=[Stop()])
    resumed = run(workplace, tmp_path / "parts", *flags)
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    again, wanted = parameters(resumed.model), parameters(whole.model)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_other_parts_cannot_be_trained_along(workplace, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="lora_enable cannot be set: only the twig is trained"):
        run(workplace, tmp_path, "--lora_enable", True)
    with pytest.raises(ValueError, match="twig_K .1. and twig_T .2. need 3 decoder layers"):
        run(workplace, tmp_path, "--twig_T", 2)
    with pytest.raises(ValueError, match="skip_samples 99: the data has"):
        run(workplace, tmp_path, "--skip_samples", 99)


@pytest.mark.parametrize("name", ["mm_use_im_start_end", "mm_use_im_patch_token"])
def test_a_twig_has_the_vocabulary_of_its_model(workplace, tmp_path, name):  # noqa: F811
    path = workplace / "start"
    values = json.loads((path / "config.json").read_text())
    assert not values.get(name)
    with pytest.raises(ValueError, match=f"--{name} True: .*start has False, and a twig knows"):
        run(workplace, tmp_path / "other", "--max_steps", 1, f"--{name}", True)
    trainer = run(workplace, tmp_path / "same", "--max_steps", 1, f"--{name}", False)
    assert trainer.model.twig.head.out_features == values["vocab_size"]


def test_pieces_that_are_not_trained_are_hidden_from_the_optimizer(model):
    training = TwigTraining(model, 1, 2)
    assert {name.split(".")[0] for name, _ in training.named_parameters()} == {"model"}
    assert len(list(training.parameters())) == 2 * 9 + 2
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)


@needs_bash
@pytest.mark.parametrize("data", [None, "my.json"])
def test_the_recipe_has_known_flags(data):
    classes = (TwigArguments, ModelArguments, DataArguments, TrainingArguments)
    known = {field.name for cls in classes for field in dataclasses.fields(cls)}
    own = {"DATA": data} if data else {}
    ((program, *words),) = words_of("v1_5/train_twig.sh", "--max_steps", 7, twig_T=2, **own)
    assert (ROOT / program).exists()
    flags = [word.removeprefix("--") for word in words if word.startswith("--")]
    assert set(flags) <= known and "twig_K" in flags
    assert ("skip_samples" in flags) == (data is None)
    assert "./checkpoints/TwigVLM-llava1.5-7b-K2-T2" in words


@pytest.mark.slow
def test_two_processes_do_the_work_of_one(workplace, tmp_path):  # noqa: F811
    flags = ["--max_steps", 4, "--optim", "sgd", "--group_by_modality_length", True]
    flags += ["--per_device_train_batch_size", 1]
    words = command_line(workplace, tmp_path / "two", *TWIG, *flags, "--ddp_backend", "gloo")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost"}
    subprocess.run(
        [*launcher, "--master_port", str(free_port()), "-m", "llava.train.train_twigvlm", *words],
        check=True, timeout=1800, cwd=ROOT, env=environment,
    )  # fmt: skip
    one = run(workplace, tmp_path / "one", *flags, "--gradient_accumulation_steps", 2)
    two = load_file(tmp_path / "two/model.safetensors")
    for name, value in one.model.twig.state_dict().items():
        assert torch.allclose(two[published_name(name)], value, atol=1e-5), name
