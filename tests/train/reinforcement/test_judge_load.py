"""The load test of a judge, and what the scripts of GlimpsePrune+ start."""

import dataclasses

import pytest
import transformers
import yaml
from urllib3.util import retry

from llava.train.glimpse.arguments import with_config
from llava.train.reinforcement.judge_load import main
from llava.train.train_glimpseprune_plus import CLASSES
from tests.eval.stub_judge import stub_judge
from tests.paths import ROOT
from tests.train.recipes import needs_bash, run_recipe, words_of

SCRIPTS = ROOT / "scripts/qwen2_5_vl"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)


def test_a_judge_that_answers_is_measured(capsys):
    with stub_judge(["score: 1"]) as server:
        main(["--judge-url", server.url, "--requests", "5", "--threads", "3"])
    assert len(server.requests) == 1 + 5 * 4
    said = capsys.readouterr().out
    assert "20 of 20 questions answered" in said and "median" in said


def test_a_judge_that_fails_under_load_is_told(capsys):
    with stub_judge(lambda n, _: "score: 1" if n < 4 else (500, "too many")) as server:
        with pytest.raises(SystemExit, match="5 questions have no verdict, .*too many"):
            main(["--judge-url", server.url, "--requests", "2", "--threads", "1"])
    assert "3 of 8 questions answered" in capsys.readouterr().out


@needs_bash
def test_the_script_checks_the_judge_and_runs_both_stages():
    plus, checked = "qwen2_5_vl/train_glimpse_plus.sh", {"CHECK": "echo check"}
    check, first, second = words_of(plus, "--seed", 1, ADAPTER="lora", **checked)
    assert check[:2] == ["check", "--requests"]
    assert first[0] == "llava.train.train_glimpseprune_plus" and first[-2:] == ["--seed", "1"]
    assert second[0] == "llava.train.train_glimpseprune" and "--seed" not in second
    assert first[first.index("--output_dir") + 1] == "lora"
    assert second[second.index("--adapter_dir") + 1] == "lora"
    (alone,) = words_of(plus, 2, "--seed", 1)
    assert alone[0] == "llava.train.train_glimpseprune" and alone[-2:] == ["--seed", "1"]
    assert len(words_of(plus, 1, **checked)) == 2


@needs_bash
def test_the_script_ends_where_the_judge_does_not_answer():
    done = run_recipe("qwen2_5_vl/train_glimpse_plus.sh", CHECK="false")
    assert done.returncode and "llava.train" not in done.stdout


@needs_bash
def test_the_judge_is_served_as_published():
    (words,) = words_of("qwen2_5_vl/judge.sh", "--seed", 1)
    assert words[:2] == ["serve", "Qwen/Qwen2.5-32B-Instruct-GPTQ-Int8"]
    pairs = dict(zip(words[2::2], words[3::2], strict=True))
    assert pairs["--tensor-parallel-size"] == "2" and pairs["--max-num-seqs"] == "4"
    assert pairs["--max-model-len"] == "2048" and pairs["--seed"] == "1"


def test_the_recipe_has_known_flags_and_the_values_of_the_paper():
    path = SCRIPTS / "train_glimpse_plus.yaml"
    words = with_config(["--config", str(path), "--output_dir", "x", "--use_cpu", "--bf16", "0"])
    parser = transformers.HfArgumentParser(CLASSES)
    model, boxes, args = parser.parse_args_into_dataclasses(words)
    known = {field.name for cls in CLASSES for field in dataclasses.fields(cls)}
    assert set(yaml.safe_load(path.read_text())) <= known
    assert (args.lora_r, args.lora_alpha, args.lora_dropout) == (32, 64, 0.05)
    assert (args.num_generations, args.gradient_accumulation_steps) == (4, 8)
    assert (args.kd_weight, args.reward_weight, args.learning_rate) == (0.04, 1.0, 1e-4)
    assert (args.max_completion_length, args.max_seq_length) == (128, 640)
    assert (boxes.max_input_seq_length, boxes.max_input_remain_seq_length) == (6000, 512)
    assert model.use_ref_masks and model.reduce_layer == 18
    # What the program does by itself is the recipe, but for the layer, which follows the model.
    own = parser.parse_args_into_dataclasses(["--output_dir", "x", "--use_cpu"])
    for name in yaml.safe_load(path.read_text()):
        given, default = (
            next(getattr(part, name) for part in parts if hasattr(part, name))
            for parts in ((model, boxes, args), own)
        )
        if name not in ("reduce_layer", "bf16", "max_input_seq_length", "save_total_limit"):
            if name not in ("max_input_remain_seq_length", "dataloader_num_workers"):
                assert given == default, name


def test_the_data_are_those_of_the_paper():
    entries = yaml.safe_load((SCRIPTS / "viscot_rand.yaml").read_text())["datasets"]
    assert len(entries) == 2 * 11 + 1
    assert {entry["sampling_strategy"] for entry in entries} == {"random:1000"}
    short = [entry for entry in entries if entry["score_funcs"] == ["precision_match"]]
    assert len(short) == 11
    for entry in short:
        assert entry["prompt"].endswith("\nAnswer the question using a single word or phrase.")
    assert all(e["prompt"] == "{}" for e in entries if e["score_funcs"] == ["llm"])
