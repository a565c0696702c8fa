"""What holds of the options of every program."""

from __future__ import annotations

import argparse
from pathlib import Path

from llava.program_parser import Several
from llava.pruning.cli import OneMethod
from tests.parsers import found
from tests.paths import ROOT


def options():
    """(program, parser, option) of all."""
    for program, parser in found()[0].items():
        for action in parser._actions:
            yield program, parser, action


def test_every_file_that_makes_a_parser_is_looked_at():
    files = [*ROOT.glob("llava/**/*.py"), *ROOT.glob("scripts/*.py")]
    calls = {path for path in files if "= ProgramParser(" in path.read_text(encoding="utf-8")}
    assert len(calls) > 50
    unseen = {path.name for path in calls - {Path(file) for file in found()[1]}}
    assert unseen == {"script_args.py"}  # which is started with words alone


def test_every_long_option_may_be_written_with_dashes_or_underscores():
    for program, parser, action in options():
        for flag in action.option_strings:
            assert "_" not in flag, (program, flag)  # help and hints show dashes
            for typed in (flag, f"--{flag[2:].replace('-', '_')}"):
                if flag.startswith("--"):
                    (word,) = parser.spelled([typed])
                    assert parser._option_string_actions[word] is action, (program, typed)


def test_no_option_is_without_a_help_text():
    """It begins with what is chosen. Hidden are the options of methods, which a page lists, and a
    word that is only refused."""
    for program, _, action in options():
        hidden = action.dest == "pruning_arg" or isinstance(action, OneMethod)
        if action.help == argparse.SUPPRESS:
            assert hidden, (program, action.option_strings)
            continue
        words = (action.help or "").split()
        what = words and words[0].lower() not in ("default:", "of", "as", "by", "for")
        assert what, (program, action.option_strings or action.dest, action.help)


def test_help_of_every_program_can_be_shown_and_says_its_defaults():
    for program, parser in found()[0].items():
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            value = action.default
            plain = isinstance(value, (int, float)) and not isinstance(value, bool)
            if plain and action.help != argparse.SUPPRESS:
                assert "default" in action.help or f"(default: {value})" in text, program


def test_a_list_takes_spaces_and_commas_in_every_program():
    """Files may have commas in their names, and so may the words of published programs."""
    upstream = {"select", "files", "ignore"}
    for program, _, action in options():
        if action.nargs in ("+", "*") and action.dest not in upstream:
            assert isinstance(action, (Several, OneMethod)), (program, action.dest)


def test_methods_are_named_in_one_way_in_every_program():
    lists = {
        program: action
        for program, _, action in options()
        if "--methods" in action.option_strings and not isinstance(action, OneMethod)
    }
    assert len(lists) >= 7
    for program, action in lists.items():
        assert isinstance(action, Several), program
        typed = {"llava/pruning/__main__.py": "str"}  # which says on its own what is wrong
        known = ("method_name", "method_or_all", typed.get(program))
        assert action.item.__name__ in known, program
