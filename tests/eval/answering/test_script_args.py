"""The words behind a benchmark's script, in our form and in those of published scripts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llava.eval.answering import script_args
from llava.eval.answering.script_args import read

MEANT = {
    "64": ("vispruner", 64, []),
    "64 0.5": ("vispruner", 64, ["important_ratio=0.5"]),
    "64 important_ratio=0.5": ("vispruner", 64, ["important_ratio=0.5"]),
    "64 --important_ratio 0.5": ("vispruner", 64, ["important_ratio=0.5"]),
    "64 .5 drop_per_round=4": ("vispruner", 64, ["drop_per_round=4", "important_ratio=0.5"]),
    "--twig a/b --retained_tokens 96": ("twigvlm", 96, ["twig=a/b"]),
    "96 --twig a/b": ("twigvlm", 96, ["twig=a/b"]),
    "--visual-token-num 96 --pruning-method pool": ("pool", 96, []),
    "0.222": ("vispruner", None, ["visual_token_ratio=0.222"]),
    ".5": ("vispruner", None, ["visual_token_ratio=0.5"]),
    "1.0": ("vispruner", None, ["visual_token_ratio=1.0"]),
    "1": ("vispruner", 1, []),
    "0.222 0.7": ("vispruner", None, ["visual_token_ratio=0.222", "important_ratio=0.7"]),
    "": ("none", None, []),
}


@pytest.mark.parametrize("line", MEANT)
def test_the_words_of_published_scripts_are_read(line):
    assert read(line.split(), "", {}) == (*MEANT[line], [])


def test_what_belongs_to_the_program_is_left_to_it():
    words = "64 --limit 3 important_ratio=0.5 --generation-strategy autoregressive".split()
    rest = ["--limit", "3", "--generation-strategy", "autoregressive"]
    assert read(words, "", {}) == ("vispruner", 64, ["important_ratio=0.5"], rest)


def test_a_named_method_keeps_its_name_and_what_it_does_not_know_is_left_to_the_program():
    assert read(["64"], "fastv", {}) == ("fastv", 64, [], [])
    assert read(["-R", "64"], "twigvlm", {}) == ("twigvlm", 64, [], [])
    assert read(["speed=3"], "fastv", {}) == ("fastv", None, ["speed=3"], [])
    assert read(["64"], "magic", {}) == ("magic", 64, [], [])


def test_the_unpruned_model_takes_any_budget_and_has_none():
    assert read(["64"], "none", {}) == read(["0.222"], "none", {}) == ("none", None, [], [])


def test_a_share_goes_to_the_method_that_is_named():
    assert read(["0.222"], "divprune", {}) == ("divprune", None, ["visual_token_ratio=0.222"], [])
    with pytest.raises(
        ValueError, match="visual_token_ratio is given twice: 0.2 in front, and 0.3"
    ):
        read(["0.2", "visual_token_ratio=0.3"], "divprune", {})


def test_environment_variables_of_published_scripts_belong_to_their_method():
    environment = {"NT": "128", "DIST": "148", "MAX_REMAIN_RATIO": "0.2"}
    assert read([], "nuwa", environment) == ("nuwa", 128, ["distance=148"], [])
    assert read(["96", "distance=18"], "nuwa", environment)[1:3] == (96, ["distance=18"])
    share = {"QWEN_VISION_TOKEN_KEEP_RATIO": "0.25"}
    assert read([], "nuwa", share) == ("nuwa", None, ["visual_token_ratio=0.25"], [])
    assert read([], "glimpseprune", environment)[2] == ["max_remain_ratio=0.2"]
    assert read(["64"], "fastv", environment) == ("fastv", 64, [], [])


def test_numbers_nobody_has_an_option_for_are_refused():
    with pytest.raises(ValueError, match="64 0.5: fastv takes visual_token_num by place, no more"):
        read(["64", "0.5"], "fastv", {})
    with pytest.raises(ValueError, match="visual_token_num is given twice: 64 in front, and 32"):
        read(["64", "visual_token_num=32"], "", {})
    with pytest.raises(ValueError, match="'layer' belongs to fastv, adaptprune, nuwa"):
        read(["64", "layer=3"], "", {})


def test_the_shell_gets_every_word_whole(capsys):
    script_args.main(["", "64", "--twig", "a b;$(c)/d", "--query", "it's"])
    printed = capsys.readouterr().out
    script = printed + 'printf "%s|" "$METHOD" "$TOKENS" "${PAIRS[@]}" "${REST[@]}"'
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout
    assert said == "twigvlm|64|twig=a b;$(c)/d|--query|it's|"
    with pytest.raises(SystemExit, match="error: 1 2 3: vispruner takes"):
        script_args.main(["", "1", "2", "3"])
    assert sys.argv  # not read: the arguments were given


def test_folders_are_meant_as_seen_from_where_the_script_was_called(tmp_path, monkeypatch, capsys):
    for name in ("there/twig", "there/tower", "here"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("CALLED_FROM", str(tmp_path / "there"))
    words = ["twigvlm", "64", "twig=twig", "--vision_tower", "./tower", "--model-base=../there"]
    script_args.main([*words, "--engine-key-file", "nowhere"])
    pairs, rest = capsys.readouterr().out.splitlines()[-1].split(" REST=")
    assert pairs == f"PAIRS=(twig={tmp_path}/there/twig)"
    wanted = f"--vision_tower {tmp_path}/there/tower --model-base={tmp_path}/there"
    assert rest == f"({wanted} --engine-key-file nowhere)"
    monkeypatch.setenv("CALLED_FROM", str(tmp_path / "here"))
    script_args.main(["twigvlm", "64", "twig=../there/twig"])  # in the same folder: as it was typed
    assert "PAIRS=(twig=../there/twig) " in capsys.readouterr().out


@pytest.mark.parametrize("words", [["sixty"], ["-5"], ["64", "0.5", "x="], [""]])
def test_a_word_in_the_place_of_the_budget_that_is_none_is_named_with_what_may_stand_there(words):
    with pytest.raises(SystemExit, match=f"error: '{words[-1]}' is neither a number of tokens"):
        script_args.main(["vispruner", *words])


@pytest.mark.parametrize("name", ["visprunr", "fastv+visprunr"])
def test_a_method_that_there_is_not_ends_a_script_before_anything_is_asked_for(name):
    with pytest.raises(SystemExit, match=r"'visprunr' \(did you mean 'vispruner'\?\)"):
        script_args.main([name, "64"])


MISPLACED = {
    "METHOD=vispruner 64": "METHOD=vispruner goes in front of the command: METHOD=vispruner bash",
    "64 LIMIT=3": "LIMIT=3 goes in front of the command",
    "vispruner 64": "a method goes in front of the command: METHOD=vispruner bash",
    "important_ratio=0.7 64": "64 stands behind important_ratio=0.7: the budget is the first word",
}


@pytest.mark.parametrize("line", MISPLACED)
def test_a_word_in_the_wrong_place_is_named_with_the_right_one(line):
    with pytest.raises(SystemExit, match=f"error: {MISPLACED[line]}"):
        script_args.main(["", *line.split()])
