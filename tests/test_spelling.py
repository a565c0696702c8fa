"""Messages about unknown words say which known one may have been meant."""

import pytest

from llava.command import COMMANDS
from llava.eval.benchmarks import find_benchmark
from llava.program_parser import ProgramParser
from llava.pruning import METHODS, build_pruner
from llava.pruning.cli import add_pruning_args
from llava.spelling import did_you_mean, unknown


def test_the_nearest_word_is_named_and_nothing_where_none_is_near():
    assert did_you_mean("visprunr", METHODS) == " (did you mean 'vispruner'?)"
    assert did_you_mean("FastV", METHODS) == " (did you mean 'fastv'?)"
    assert did_you_mean("magic", METHODS) == ""
    assert did_you_mean("compre", COMMANDS) == " (did you mean 'compare'?)"


def test_a_word_that_merely_has_some_of_the_letters_is_not_suggested():
    assert did_you_mean("nope", METHODS) == ""  # which is not none
    assert did_you_mean("--limit", ["--time-limit", "--layers"]) == ""


def test_a_list_of_all_words_comes_only_where_none_is_suggested():
    assert unknown("word", "botlte", ["bottle", "cup"]) == (
        "unknown word 'botlte' (did you mean 'bottle'?)"
    )
    assert unknown("word", "x", ["bottle", "cup"]) == "unknown word 'x', choose from bottle, cup"


@pytest.mark.parametrize("name", ["vispruner,fastv", "vispruner, fastv", "vispruner fastv"])
def test_several_methods_where_one_is_taken_are_answered_with_what_takes_them(name):
    said = r"vispruner\+fastv is two in a row, and llava compare --methods vispruner fastv compares"
    with pytest.raises(ValueError, match=said):
        build_pruner(name)


def test_methods_options_and_benchmarks_are_suggested():
    with pytest.raises(ValueError, match=r"'divprun' \(did you mean 'divprune'\?\)$"):
        build_pruner("divprun")
    with pytest.raises(ValueError, match=r"\(did you mean 'important_ratio'\?\)"):
        build_pruner("vispruner", importent_ratio=0.5)
    with pytest.raises(ValueError, match=r"'textvqua' \(did you mean 'textvqa'\?\)"):
        find_benchmark("textvqua")


@pytest.fixture
def parser():
    made = ProgramParser("")
    made.add_argument("--device", choices=("cuda", "cpu"))
    add_pruning_args(made)
    return made


@pytest.mark.parametrize(
    "words, meant",
    [
        (["--visual-token-nun", "3"], "--visual-token-num"),
        (["--importent_ratio=0.5"], "--important-ratio"),
        (["--device", "cudda"], "cuda"),
        (["--generation-strategy", "selfspeculative"], "self_speculative"),
    ],
)
def test_a_parser_suggests_options_and_choices(parser, words, meant, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert capsys.readouterr().err.endswith(f" (did you mean '{meant}'?)\n")


def test_a_parser_keeps_its_other_messages(capsys):
    parser = ProgramParser("")
    parser.add_argument("file")
    for words, said in (([], "required: file\n"), (["a", "--quite"], "arguments: --quite\n")):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert capsys.readouterr().err.endswith(said)
