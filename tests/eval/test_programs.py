"""Command lines of the answering programs: mistakes are told in one line, before a model loads."""

import json
import sys

import pytest

from llava.conv_mode import resolve_conv_mode
from llava.eval import model_vqa_loader, run_llava
from llava.eval.compare import suite
from llava.program_parser import ProgramParser


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["model_vqa_loader", *map(str, argv)])
    model_vqa_loader.main()


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question_id": 1, "image": "a.png", "text": "?"}) + "\n{oops\n")
    return path


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "q.jsonl, line 2: not valid JSON"),
        (["--conv-mode", "vicuna"], "unknown conv mode 'vicuna', choose from auto, "),
        (["--pruning-method", "shrink"], "unknown pruning method 'shrink', choose from"),
        (["--question-file", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_mistake_is_named_in_one_line(monkeypatch, questions, tmp_path, options, message):
    files = ["--question-file", questions, "--answers-file", tmp_path / "a.jsonl"]
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--model-path", "llava-v1.5-7b", *files, *options)
    assert stop.value.code.startswith("error: ") and message in stop.value.code
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.parametrize(
    "conv_mode, model_name, resolved",
    [
        ("auto", "llava-v1.5-7b", "vicuna_v1"),
        ("auto", "llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava_v1", "llava-v1.5-7b", "llava_v1"),
        ("v0", "llava-plain-7b", "v0_mmtag"),
        ("v0", "llava-plain-Finetune-7b", "v0"),
    ],
)
def test_the_template_follows_the_option_and_the_name(conv_mode, model_name, resolved):
    assert resolve_conv_mode(conv_mode, model_name) == resolved


def test_flags_are_accepted_with_underscores_too():
    parser = model_vqa_loader.build_parser("")
    dashes = parser.parse_args("--max-new-tokens 7 --num-chunks 2 --top-p 0.5".split())
    assert dashes == parser.parse_args("--max_new_tokens 7 --num_chunks 2 --top_p 0.5".split())
    assert (dashes.max_new_tokens, dashes.num_chunks, dashes.top_p) == (7, 2, 0.5)


def test_every_program_knows_the_same_options_of_a_model():
    words = "--model_path m --dtype bf16 --attn-implementation eager --load_4bit".split()
    suites = ProgramParser()
    suite.add_suite_args(suites, out="runs")
    for parser in (model_vqa_loader.build_parser(""), run_llava.build_parser(), suites):
        args = parser.parse_args(words)
        found = (args.model_path, args.dtype, args.attn_implementation, args.load_4bit)
        assert found == ("m", "bf16", "eager", True)
