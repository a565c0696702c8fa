"""Options without a method name: the method they belong to, in Python and on the command line."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from llava.eval import model_vqa_loader, run_llava
from llava.program_parser import ProgramParser
from llava.pruning import METHODS, Published, build_pruner, guess_method, pruner_from_keywords
from llava.pruning.base import BudgetPruner, option_names
from llava.pruning.cli import add_option_args, pairs_in, pruner_from_args
from llava.serve import cli, model_worker

PARSERS = {
    "run_llava": run_llava.build_parser,
    "model_vqa_loader": lambda: model_vqa_loader.build_parser("d"),
    "cli": cli.build_parser,
    "model_worker": model_worker.build_parser,
}
MEANT = {
    "--visual_token_num 64 --important_ratio 0.25": ("vispruner", {"important_ratio": 0.25}),
    "--visual-token-num 64 --important-ratio 0.25": ("vispruner", {"important_ratio": 0.25}),
    "--visual_token_num 64": ("vispruner", {"visual_token_num": 64}),
    "--important_ratio=0.25": ("vispruner", {"visual_token_num": 64}),
    "--twig dir --retained_tokens 128": ("twigvlm", {"visual_token_num": 128, "twig": "dir"}),
    "--twig dir --visual-token-num 64 --retained_tokens 64": ("twigvlm", {"visual_token_num": 64}),
    "--twig-block dir --twig-K 2 -R 96": ("twigvlm", {"visual_token_num": 96, "twig_K": 2}),
    "--layer_list [8,16] --image_token_ratio_list [.5,.25]": (
        "pyramiddrop",
        {"layer_list": [8, 16], "image_token_ratio_list": [0.5, 0.25]},
    ),
    "--visual_token_num 96 --layer_list [16] --image_token_list [32]": (
        "vscan",  # whose release calls by that name what leaves the vision stage
        {"encoder_token_num": 96, "visual_token_num": 64, "image_token_list": [32]},
    ),
    "--pruning-method sparsevlm --retained_tokens 128": ("sparsevlm", {"visual_token_num": 128}),
    "--pruning-method fastv --layer 3": ("fastv", {"layer": 3}),
    "--dominant 54 --contextual 10": ("visionzip", {"dominant": 54, "contextual": 10}),
    "--new_modules_dir dir --max_remain_ratio .2": ("glimpseprune", {"new_modules": "dir"}),
    "--pruning-arg important_ratio=0.25": ("vispruner", {"important_ratio": 0.25}),
    "--pruning-method none": ("none", {}),
    "": ("none", {}),
}
REFUSED = {
    "--layer 3": "'layer' belongs to fastv, adaptprune, nuwa, dart: name one method",
    "--retained_tokens 64": "belongs to sparsevlm, twigvlm, twigvlm_plus: name one",
    "--important_ratio .5 --alpha 1": "no pruning method has all of these options",
    "--pruning-method none --visual-token-num 64": "unknown option 'visual_token_num'",
    "--pruning-method fastv --important-ratio 0.5": "unknown option 'important_ratio'",
    "--pruning-arg colour=red": "no pruning method has an option 'colour'",
    "--twig d --visual-token-num 64 --retained_tokens 32": "are two names of one option",
}


@pytest.mark.parametrize("program", PARSERS)
@pytest.mark.parametrize("line", MEANT)
def test_the_flags_of_a_release_choose_its_method_in_every_program(program, line, capsys):
    name, options = MEANT[line]
    pruner = pruner_from_args(PARSERS[program]().parse_args(line.split()))
    assert pruner.name == name
    assert {key: getattr(pruner, key) for key in options} == options
    guessed = line and "--pruning-method" not in line
    assert (f"pruning method: {name}" in capsys.readouterr().err) == bool(guessed)


@pytest.mark.parametrize("line", REFUSED)
def test_what_could_mean_several_methods_or_none_is_an_error(line):
    args = run_llava.build_parser().parse_args(line.split())
    with pytest.raises(ValueError, match=REFUSED[line]):
        pruner_from_args(args)


def test_every_option_of_every_method_is_a_flag():
    parser = ProgramParser()
    add_option_args(parser)
    for name, method in METHODS.items():
        for option in set(option_names(method)) - {"visual_token_num"}:
            args = parser.parse_args([f"--{option}", "1", f"--{option.replace('_', '-')}", "2"])
            assert args.pruning_arg == [f"{option}=1", f"{option}=2"], name


def test_a_flag_of_the_program_itself_stays_its_own():
    parser = ProgramParser()
    parser.add_argument("--seed", type=int)
    add_option_args(parser)
    args = parser.parse_args(["--seed", "3"])
    assert args.seed == 3 and args.pruning_arg == []


def test_the_table_follows_from_the_methods(monkeypatch):
    @dataclass
    class Other(BudgetPruner):
        speed: int = 1

        name = "other"
        published = Published(options={"fast": "speed"})

    monkeypatch.setitem(METHODS, "other", Other)
    args = run_llava.build_parser().parse_args(["--fast", "2", "--visual-token-num", "9"])
    assert pruner_from_args(args) == Other(9, speed=2)
    assert pruner_from_keywords(None, {"speed": 3}) == Other(speed=3)


def test_attributes_of_an_args_object_count_as_flags():
    args = type("Args", (), {"important_ratio": 0.25, "visual_token_num": 64, "seed": None})()
    assert pairs_in(args) == ["important_ratio=0.25"]


def test_keywords_of_a_loader_choose_their_method():
    for keywords, method, options in (
        ({"important_ratio": 0.25}, "vispruner", {"important_ratio": 0.25}),
        ({"matain_token": 96, "distance": 148}, "nuwa", {"visual_token_num": 96, "distance": 148}),
        *(  # as the release has it, and in our names, which then mean what they do here
            ({**given, "image_token_list": [32]}, "vscan", {"encoder_token_num": 96, **ours})
            for given, ours in (
                ({"visual_token_num": 96}, {"visual_token_num": 64}),
                ({"encoder_token_num": 96, "visual_token_num": 48}, {"visual_token_num": 48}),
            )
        ),
        ({"twigvlm_config": {}}, "twigvlm", {"enable_pruning": True}),
        ({"twigvlm_config": None, "layer": None}, "none", {}),
        (
            {"twigvlm_config": {"enable_FastV": False, "attention_rank": 96.0}, "twig": "dir"},
            "twigvlm",
            {"enable_pruning": False, "visual_token_num": 96, "twig": "dir"},
        ),
    ):
        given = {**keywords, "colour": 1}
        pruner = pruner_from_keywords(None, given)
        assert pruner.name == method and given == {"colour": 1}
        assert {key: getattr(pruner, key) for key in options} == options


def test_keywords_of_two_methods_in_a_row_have_their_prefixes():
    keywords = {"vispruner_visual_token_num": 192, "fastv_layer": 3, "colour": 1}
    pruner = pruner_from_keywords("vispruner+fastv", keywords)
    assert pruner.first.visual_token_num == 192 and pruner.second.layer == 3
    assert keywords == {"colour": 1}


def test_a_published_dict_goes_with_its_own_method_alone():
    config = {"attention_rank": 96, "generation_strategy": "self_speculative"}
    keywords = {"twigvlm_config": config}
    assert pruner_from_keywords("twigvlm", keywords).visual_token_num == 96
    assert keywords == {"generation_strategy": "self_speculative"}
    with pytest.raises(ValueError, match="twigvlm_config belongs to the method 'twigvlm'"):
        pruner_from_keywords("fastv", {"twigvlm_config": config})
    with pytest.raises(ValueError, match="given beside a finished pruner"):
        pruner_from_keywords(build_pruner("random"), {"twigvlm_config": {}})
    with pytest.raises(ValueError, match="unknown entry 'rank' of twigvlm_config"):
        pruner_from_keywords(None, {"twigvlm_config": {"rank": 1}})
    with pytest.raises(ValueError, match="twigvlm_config must be a dict"):
        pruner_from_keywords(None, {"twigvlm_config": 64})


def test_no_options_mean_no_method():
    assert guess_method({}) == ("none", {})
