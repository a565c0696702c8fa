"""Both stages of TwigVLM++'s training as programs: they resume exactly, and write what loads."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llava.model import LlavaLlamaForCausalLM
from llava.pruning import build_pruner
from llava.pruning.twigvlm import grow_twig, save_twig
from llava.train.train_twigvlm_plus import CLASSES, keep_questions_about_images, train
from tests.paths import ROOT
from tests.ports import free_port
from tests.train.recipes import needs_bash, words_of
from tests.train.test_run import command_line, losses, parameters, workplace  # noqa: F401

ONE = ["--stage", 1, "--twig_K", 0, "--twig_T", 1]
TWO = ["--stage", 2, "--num_groups", 3]
GATES = {"leaf_attention_module.q_gate.weight", "leaf_attention_module.k_gate.weight"}


def run(place, output, *flags, **options):
    return train(command_line(place, output, *flags), **options)


@pytest.fixture(scope="module")
def stage1(workplace):  # noqa: F811
    """A finished run of stage 1: (folder, Trainer)."""
    output = workplace / "stage1"
    trainer = run(workplace, output, *ONE, "--num_train_epochs", 4, "--bf16", True)
    return output, trainer


def test_stage_1_teaches_the_twig_alone_and_writes_it_as_published(workplace, stage1):  # noqa: F811
    output, trainer = stage1
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
    parts = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in parts:
        total = entry["ntp"] + 0.1 * entry["pred_kl"] + entry["attn_kl"]
        assert entry["loss"] == pytest.approx(total, abs=2e-3)
    start = parameters(LlavaLlamaForCausalLM.from_pretrained(workplace / "start").bfloat16())
    trunk = parameters(trainer.model.trunk)
    assert all(torch.equal(trunk[name], start[name]) for name in start)
    tensors = load_file(output / "model.safetensors")
    assert GATES <= set(tensors) and len(tensors) == 9 + 4
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert json.loads((output / "config.json").read_text()) == {
        "pruning_method": "twigvlm_plus",
        "base_model": "start",
        "twig_K": 0,
        "twig_T": 1,
        "hidden_size": 32,
        "vocab_size": 700,
        "final_wipe_layer": 1,
        "attention_layer": 0,
        "stage": 1,
        "conv_mode": "vicuna_v1",
    }
    model = LlavaLlamaForCausalLM.from_pretrained(workplace / "start").eval()
    model.pruner = build_pruner("twigvlm_plus", twig=str(output), visual_token_num=20)
    answer = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=3, eos_token_id=-1)
    assert answer.shape == (1, 3)


def test_stage_2_changes_the_gates_and_not_a_byte_beside_them(workplace, stage1, tmp_path):  # noqa: F811
    trainer = run(workplace, tmp_path, *TWO, "--twig_path", stage1[0], "--num_samples", 8)
    assert trainer.state.global_step == 4  # of two samples each
    entry = trainer.state.log_history[0]
    assert {"policy", "attn_kl", "cost", "cost_std", "kept"} <= entry.keys()
    before, after = (load_file(p / "model.safetensors") for p in (stage1[0], tmp_path))
    assert {name for name in after if not torch.equal(after[name], before[name])} == GATES
    assert {name: t.dtype for name, t in after.items()} == {n: t.dtype for n, t in before.items()}
    one, two = (json.loads((p / "config.json").read_text()) for p in (stage1[0], tmp_path))
    assert two == one | {"stage": 2}
    assert len(trainer.train_dataset) == 5  # of six samples, those with an image


def test_stage_1_may_begin_with_a_twig_that_there_is(workplace, stage1, tmp_path):  # noqa: F811
    model = LlavaLlamaForCausalLM.from_pretrained(workplace / "start")
    twig = {name: torch.randn_like(w) for name, w in grow_twig(model, 0, 1).state_dict().items()}
    save_twig(str(tmp_path / "plain"), twig, 0, "start")
    flags = ["--stage", 1, "--max_steps", 1, "--learning_rate", 0]
    trainer = run(workplace, tmp_path / "out", *flags, "--twig_path", tmp_path / "plain")
    own = trainer.model.twig.state_dict()
    assert trainer.model.shared_layers == 0 and all(torch.equal(own[n], w) for n, w in twig.items())
    again = run(workplace, tmp_path / "again", *flags, "--twig_path", stage1[0]).model.twig
    kept = stage1[1].model.twig.state_dict()
    for name, weight in again.state_dict().items():
        assert torch.equal(weight.bfloat16(), kept[name].bfloat16()), name


@pytest.mark.parametrize("stage", [1, 2])
def test_a_resumed_run_continues_exactly(workplace, stage1, tmp_path, stage):  # noqa: F811
    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    flags = ["--save_strategy", "steps", "--save_steps", 2, "--gradient_accumulation_steps", 1]
    flags += ONE if stage == 1 else [*TWO, "--twig_path", stage1[0]]
    whole = run(workplace, tmp_path / "whole", *flags)
    run(workplace, tmp_path / "parts", *flags, callbacks=[Stop()])
    resumed = run(workplace, tmp_path / "parts", *flags)
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    again, wanted = parameters(resumed.model), parameters(whole.model)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)
    assert len(load_file(tmp_path / "parts/checkpoint-2/model.safetensors")) == 9 + 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stage", 3], "--stage 3 is unknown: 1 distils, 2 reinforces"),
        ([*ONE, "--num_groups", 4], "--num_groups belongs to --stage 2, this is 1"),
        ([*TWO, "--alpha", 1], "--alpha belongs to --stage 1, this is 2"),
        (TWO, "--twig_path is missing: stage 2 goes on with the twig of stage 1"),
        ([*TWO, "--twig_path", "no/where"], "checkpoint folder 'no/where' does not exist|neither"),
        ([*ONE, "--lora_enable", True], "lora_enable cannot be set: only the twig is trained"),
        ([*ONE, "--attention_layer", 2], "attention_layer .2. must be one of the 2 decoder"),
    ],
)
def test_flags_that_do_not_fit_are_refused(workplace, tmp_path, flags, message):  # noqa: F811
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(workplace, tmp_path, *flags)


def test_stage_2_refuses_plain_twigs_texts_alone_and_its_own_start(workplace, stage1, tmp_path):  # noqa: F811
    model = LlavaLlamaForCausalLM.from_pretrained(workplace / "start")
    save_twig(str(tmp_path / "plain"), grow_twig(model, 0, 1).state_dict(), 0, "start")
    with pytest.raises(ValueError, match="trained part of 'twigvlm', not of 'twigvlm_plus'"):
        run(workplace, tmp_path / "out", *TWO, "--twig_path", tmp_path / "plain")
    with pytest.raises(ValueError, match="is that of stage 1, which is still needed"):
        over = "--overwrite_output_dir", "True"
        run(workplace, stage1[0], *TWO, "--twig_path", stage1[0], *over)
    rows = json.loads((workplace / "data.json").read_text())
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps([row for row in rows if "image" not in row]))
    words = [*TWO, "--twig_path", stage1[0], "--data_path", texts]
    with pytest.raises(ValueError, match="stage 2 needs samples with an image, and an answer"):
        run(workplace, tmp_path / "out", *words)
    for row in rows:  # texts keep their answers, so that the data as such can be learned from
        row["conversations"][0]["value"] += " so" * 400 if "image" in row else ""
    texts.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="an answer within model_max_length: there is none"):
        run(workplace, tmp_path / "out", *words)


def test_stage_2_keeps_questions_behind_a_system_turn_or_a_leading_answer():
    asked = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    late = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}, *asked]
    fronts = [[], [{"from": "system", "value": "Be brief."}], [{"from": "gpt", "value": "Hi."}]]
    samples = [{"image": "a.png", "conversations": [*front, *asked]} for front in fronts]
    samples += [{"image": "a.png", "conversations": [*front, *late]} for front in fronts]
    samples += [{"image": "cut.png", "conversations": asked}]
    data = SimpleNamespace(samples=samples, numbers=list(range(7)), data_path="data.json")
    data.keeps_an_answer = lambda sample: sample["image"] != "cut.png"
    keep_questions_about_images(data)
    assert data.numbers == [0, 1, 2]


@needs_bash
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("data", [None, "my.json"])
def test_the_recipes_have_known_flags(stage, data):
    known = {field.name for cls in CLASSES for field in dataclasses.fields(cls)}
    own = {"twig_T": 2, "A_B": 17, "NUM_GROUPS": 8, "D_ALPHG": 0.2}
    own |= {"DATA": data} if data else {}
    ((program, *words),) = words_of(f"v1_5/train/train_twig++_stage{stage}.sh", **own)
    assert (ROOT / program).exists()
    flags = [word.removeprefix("--") for word in words if word.startswith("--")]
    assert set(flags) <= known and ("skip_samples" in flags) == (data is None)
    value = {flag: words[words.index(f"--{flag}") + 1] for flag in flags}
    assert value["stage"] == str(stage) and value["attention_layer"] == "17"
    assert value["learning_rate"] == "1e-4"
    folder = "./checkpoints/TwigVLM++-stage{}-llava1.5-7b-K2-T{}"
    if stage == 1:
        assert value["alpha"] == "0.2" and value["output_dir"] == folder.format(1, 2)
    else:
        assert value["num_groups"] == "8" and value["num_samples"] == "64000"
        assert value["twig_path"] == folder.format(1, 2 + 1)
        assert value["output_dir"] == folder.format(2, 2 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_do_the_work_of_one(workplace, stage1, tmp_path, stage):  # noqa: F811
    flags = ["--max_steps", 2, "--optim", "sgd", "--per_device_train_batch_size", 1]
    flags += ONE if stage == 1 else [*TWO, "--twig_path", stage1[0]]
    words = command_line(workplace, tmp_path / "two", *flags, "--ddp_backend", "gloo")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost"}
    program = ["-m", "llava.train.train_twigvlm_plus", *words]
    subprocess.run(
        [*launcher, "--master_port", str(free_port()), *program],
        check=True, timeout=1800, cwd=ROOT, env=environment,
    )  # fmt: skip
    run(workplace, tmp_path / "one", *flags, "--gradient_accumulation_steps", 2)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        rounding = 1e-4 if value.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=rounding, msg=name)
