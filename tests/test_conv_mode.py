"""The prompt template of a checkpoint: its config decides, its name comes last, and it is said."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from llava import playground
from llava.conv_mode import checkpoint_conv_mode, choose_conv_mode, resolve_conv_mode
from llava.conversation import conv_templates
from llava.eval import model_vqa_loader, model_vqa_science, run_llava
from llava.eval.compare import suite
from llava.eval.efficiency.arguments import fill_in_questions
from llava.mm_utils import get_model_name_from_path, infer_conv_mode
from llava.model import LlavaConfig, LlavaMistralConfig
from llava.program_parser import ProgramParser
from llava.serve import model_worker
from llava.serve.engine import Engine
from llava.train.llava_family import LlavaFamily
from tests.model.checkpoint_tools import CHECKPOINT, NEXT, copy_of

LLAMA = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava"}
LLAVA_15 = {**LLAMA, "mm_projector_type": "mlp2x_gelu", "vocab_size": 32000}
EARLY = {**LLAMA, "mm_vision_tower": "openai/clip-vit-large-patch14", "vocab_size": 32001}
MISTRAL = {"architectures": ["LlavaMistralForCausalLM"], "model_type": "llava_mistral"}
#: names that point at another template than that of LLaVA-1.5
NAMES = [
    "my-llava",
    "llava-7b-finetuned",
    "checkpoint-500",
    "0f1e2d3c4b5a",
    "llava-v0",
    "mistral-comparison",
    "llava-llama-2-baseline",
    "ablation-34b",
    "llava-mpt-prompt-tuned",
    "llava-plain",
]


@pytest.mark.parametrize(
    "config, name, template, source",
    [
        (LLAVA_15 | {"conv_mode": "mpt"}, "llava-v1.5-7b", "mpt", "config"),
        (LLAVA_15 | {"conv_mode": None}, "x", "vicuna_v1", "shape"),
        *((LLAVA_15, name, "vicuna_v1", "shape") for name in NAMES),
        (LLAMA | {"image_aspect_ratio": "anyres"}, "x", "vicuna_v1", "shape"),
        (MISTRAL | {"mm_projector_type": "mlp2x_gelu"}, "llava-v1.5", "mistral_instruct", "shape"),
        (LLAVA_15 | {"vocab_size": 64000}, "llava-v1.5", "chatml_direct", "shape"),
        (EARLY, "LLaVA-7b-delta-v0", "llava_v0", "name"),
        (EARLY, "llava-llama-2-13b-chat", "llava_llama_2", "name"),
        (EARLY, "LLaVA-Lightning-7B-v1-1", "vicuna_v1", "name"),
        (EARLY, "my-llava", "vicuna_v1", "default"),
        ({}, "llava-v1.6-34b", "chatml_direct", "name"),
        ({}, "llava-v1.5-7b-prompt-tuned", "vicuna_v1", "name"),
        ({}, "llava-attempt2", "vicuna_v1", "default"),
        ({}, "llava-explained", "vicuna_v1", "default"),
        ({}, "llava-plain-7b", "v0_mmtag", "name"),
        ({"hidden_size": 8}, "anything", "vicuna_v1", "default"),
    ],
)
def test_the_config_decides_and_the_name_comes_last(config, name, template, source):
    choice = choose_conv_mode(config, name)
    assert (choice.name, choice.source) == (template, source)
    assert str(choice) == f"prompt template {template}: {choice.reason}" and choice.reason
    assert infer_conv_mode(name, config) == template


def test_a_loaded_model_knows_its_template():
    shape = {"mm_projector_type": "mlp2x_gelu"}
    assert infer_conv_mode("x", LlavaConfig(**shape)) == "vicuna_v1"
    assert infer_conv_mode("x", LlavaMistralConfig(**shape)) == "mistral_instruct"
    assert infer_conv_mode("llava-v1.5", LlavaConfig(conv_mode="mpt")) == "mpt"


@pytest.mark.parametrize("name", [7, "vicuna", "auto", ["mpt"]])
def test_a_template_that_does_not_exist_is_named(name):
    with pytest.raises(ValueError, match="unknown conv_mode in config.json .* choose from default"):
        choose_conv_mode({"conv_mode": name})
    if isinstance(name, str) and name != "auto":
        with pytest.raises(ValueError, match="unknown conv mode 'vicuna', choose from auto"):
            checkpoint_conv_mode("nowhere/at-all", given=name)


def test_a_folder_that_is_not_there_has_no_template(tmp_path, capsys):
    for gone in ((str(tmp_path / "no"), None), (str(CHECKPOINT), str(tmp_path / "no"))):
        with pytest.raises(FileNotFoundError, match="no. does not exist"):
            resolve_conv_mode("auto", "no", *gone)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_copies_of_any_name_get_one_template_and_one_line(tmp_path, capsys, name):
    folder = copy_of(CHECKPOINT, tmp_path / name)
    model_name = get_model_name_from_path(str(folder))
    assert resolve_conv_mode("auto", model_name, str(folder)) == "vicuna_v1"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("prompt template vicuna_v1: config.json describes a LLaVA-1.5")
    assert resolve_conv_mode(None, model_name, str(folder), compare=True) == "vicuna_v1"
    assert capsys.readouterr().err == line + "\n"


def test_nothing_is_said_where_the_name_or_the_user_decided(tmp_path, capsys, monkeypatch):
    assert resolve_conv_mode("auto", "llava-v1.6-mistral-7b") == "mistral_instruct"
    assert resolve_conv_mode("llava_v1", "my-llava", str(CHECKPOINT)) == "llava_v1"
    monkeypatch.setenv("RANK", "1")  # one process of several speaks
    assert resolve_conv_mode("auto", "my-llava", str(CHECKPOINT)) == "vicuna_v1"
    assert capsys.readouterr().err == ""


def test_another_template_than_the_checkpoints_own_is_said_where_a_program_compares(capsys):
    for compare, lines in ((False, 0), (True, 1)):
        asked = resolve_conv_mode("mpt", "my-llava", str(CHECKPOINT), compare=compare)
        said = capsys.readouterr().err.splitlines()
        assert asked == "mpt" and len(said) == lines
    assert "inferred conversation mode is vicuna_v1, while `--conv-mode` is mpt" in said[0]
    assert resolve_conv_mode("v1", "my-plain-7b", compare=True) == "v1_mmtag"


def test_an_adapter_without_a_config_has_the_template_of_its_base(tmp_path):
    assert resolve_conv_mode("auto", "x-v0", str(tmp_path), str(NEXT)) == "vicuna_v1"


def test_the_name_plain_counts_only_where_the_config_does_not_know_better():
    assert choose_conv_mode({}, "llava-plain-7b", "v0").name == "v0_mmtag"
    assert choose_conv_mode(EARLY, "llava-plain-7b", "llava_v1").name == "v1_mmtag"
    tuned = EARLY | {"tune_mm_mlp_adapter": False}
    assert choose_conv_mode(tuned, "llava-plain-7b", "v0").name == "v0"
    assert choose_conv_mode({}, "llava-explain-7b", "v0").name == "v0"
    assert choose_conv_mode({}, "llava-plain-7b", "mpt").name == "mpt"


# Programs.


@pytest.mark.parametrize("program", [model_vqa_loader, model_vqa_science])
def test_answering_programs_ask_the_checkpoint(tmp_path, monkeypatch, program):
    folder = copy_of(CHECKPOINT, tmp_path / "my-v0", conv_mode="mistral_instruct")
    monkeypatch.setattr(sys, "argv", ["program", "--model-path", str(folder)])
    parser = model_vqa_loader.build_parser("")
    assert model_vqa_loader.parse_args(parser).conv_mode == "mistral_instruct"
    assert "llava_v0" not in Path(program.__file__).read_text()


def test_other_programs_ask_the_checkpoint(tmp_path, monkeypatch):
    folder = copy_of(CHECKPOINT, tmp_path / "my-v0", conv_mode="mpt")
    monkeypatch.setattr(sys, "argv", ["suite", "--model-path", str(folder), "--data-dir", "d"])
    parser = ProgramParser()
    suite.add_suite_args(parser, out="runs")
    assert suite.parse_suite_args(parser).conv_mode == "mpt"
    args = SimpleNamespace(model_path=str(folder), model_base=None, conv_mode="auto")
    args.question_file = args.image_folder = "here"
    fill_in_questions(args, "questions.jsonl")
    assert args.conv_mode == "mpt" and args.question_file == "here"


def test_the_worker_answers_in_the_template_of_its_model_and_says_which(model):
    model.config.conv_mode = "mpt"
    try:
        engine = Engine(None, model, None, "llava-v1.5-7b")
        assert engine.front.prompt("?").startswith(conv_templates["mpt"].system)
        assert engine.status()["conv_mode"] == "mpt"
    finally:
        del model.config.conv_mode


@pytest.mark.parametrize("name", ["my-mpt", "llava-v0", "mistral"])
def test_what_clients_call_a_model_does_not_choose_its_template(name, model, monkeypatch):
    monkeypatch.setattr(model_worker, "load_from_args", lambda *_: (None, model, None))
    monkeypatch.setattr("llava.conv_mode._by_shape", lambda values: None)  # the name decides
    own = model_worker.build_parser().parse_args(["--model-path", "/models/llava-v1-7b"])
    named = model_worker.build_parser().parse_args(
        ["--model-path", "/models/llava-v1-7b", "--model-name", name]
    )
    engines = [model_worker.load_engine(args) for args in (own, named)]
    assert [engine.model_name for engine in engines] == ["llava-v1-7b", name]
    assert [engine.conv_mode.name for engine in engines] == ["vicuna_v1"] * 2


@pytest.mark.parametrize(
    "version, name",
    [("v0", "vicuna_v1"), ("v1", "vicuna_v1"), ("plain", "plain"), ("chatml_direct",) * 2],
)
def test_training_writes_its_template_into_the_config(version, name):
    tokenizer = SimpleNamespace(pad_token="<pad>", unk_token="<unk>")
    model = SimpleNamespace(config=LlamaConfig())
    assert LlavaFamily().choose_template(tokenizer, model, version) is conv_templates[name]
    saved = json.loads(model.config.to_json_string())
    assert saved["conv_mode"] == name and infer_conv_mode("llava-v0", saved) == name
    with pytest.raises(ValueError, match="unknown version 'v1.5', choose from v0.5, "):
        LlavaFamily().choose_template(tokenizer, model, "v1.5")


# The playground under other names.

QUESTION = "Describe the image."


@pytest.fixture(scope="module")
def answer_of():
    def ask(path) -> str:
        torch.manual_seed(0)
        args = run_llava.build_parser().parse_args(
            ["--model-path", str(path), "--query", QUESTION, "--temperature", "0"]
        )
        args.image_file, args.max_new_tokens = playground.default_image(), 12
        return run_llava.answer(args)

    return ask


@pytest.mark.filterwarnings("ignore:vision tower")
def test_a_renamed_copy_of_the_playground_gives_the_same_answer(tmp_path, answer_of, capsys):
    source = Path(playground.default_model_path())
    expected = answer_of(source)
    assert "conv_mode in config.json" in capsys.readouterr().err
    for keep in (True, False):
        folder = tmp_path / "runs" / ("my-llava" if keep else "checkpoint-500")
        shutil.copytree(source, folder)  # without the tower its relative path leads to
        values = json.loads((folder / "config.json").read_text())
        if not keep:
            del values["conv_mode"]
        (folder / "config.json").write_text(json.dumps(values))
        assert answer_of(folder) == expected
        assert "prompt template vicuna_v1" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "clip-playground-patch14-336")
