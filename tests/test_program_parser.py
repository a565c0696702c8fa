"""Usage and errors of a program name what the user typed, and say what was probably meant."""

import ast
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest

from llava import command
from llava.errors import one_line_warnings
from llava.eval import run_llava
from llava.eval.answering import program
from llava.program_parser import RANGES, TYPED, ProgramParser, Several, typed_command
from llava.train.run import FlagParser
from tests.paths import ROOT


def started(monkeypatch, first: str, module: str | None = None) -> None:
    """Makes this process look as if it had been started so; `module` stood behind -m."""
    spec = SimpleNamespace(name=module) if module else None
    monkeypatch.setattr(sys, "argv", [first])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)


@pytest.mark.parametrize(
    "first, module, typed",
    [
        ("/venv/bin/llava", None, "llava"),
        ("scripts/merge_lora_weights.py", None, "merge_lora_weights.py"),
        ("/src/llava/eval/run_llava.py", "llava.eval.run_llava", "python -m llava.eval.run_llava"),
        ("/src/llava/pruning/__main__.py", "llava.pruning.__main__", "python -m llava.pruning"),
    ],
)
def test_a_parser_has_the_name_that_was_typed(first, module, typed, monkeypatch):
    started(monkeypatch, first, module)
    assert typed_command() == ProgramParser("about").prog == FlagParser([]).prog == typed


@pytest.mark.parametrize(
    "first, module, typed",
    [
        ("/venv/bin/llava", None, "llava"),
        ("/src/llava/__main__.py", "llava.__main__", "python -m llava"),
    ],
)
@pytest.mark.parametrize("name", [n for n, c in command.COMMANDS.items() if c.module])
def test_help_of_a_sub_command_has_its_name(name, first, module, typed, monkeypatch, capsys):
    started(monkeypatch, first, module)
    with pytest.raises(SystemExit):
        command.main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: {typed} {name} ")


@pytest.mark.parametrize("words", ["llava compare", "llava.eval.compare"])
def test_a_wrong_option_is_answered_by_the_command_that_was_typed(words):
    started = ["-m", *words.split(), "--toknes", "64"]
    done = subprocess.run([sys.executable, *started], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"usage: python -m {words} ")
    said = (
        f"python -m {words}: error: unrecognized arguments: --toknes 64 (did you mean '--tokens'?)"
    )
    assert done.stderr.splitlines()[-1] == said


def test_no_program_of_the_package_has_another_parser():
    others = []
    for path in sorted([*ROOT.glob("llava/**/*.py"), *ROOT.glob("scripts/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser"):
                others.append(path.name)
    assert others == []


def test_an_option_may_be_written_with_dashes_or_underscores_however_it_was_added():
    parser = ProgramParser("")
    parser.add_argument_group("a group").add_argument("--top_p", type=float)
    parser.add_argument("--data-dir")
    for flag in ("--top_p", "--top-p", "--top"):
        assert parser.parse_args([flag, "0.5"]).top_p == 0.5
    for words in (["--data_dir=a_b"], ["--data-dir=a_b"], ["--data_d", "a_b"]):
        assert parser.parse_args(words).data_dir == "a_b"
    parser.add_argument("words", nargs="*")
    assert parser.parse_args(["--", "--data_dir"]).words == ["--data_dir"]
    assert parser.parse_known_args(["--other_option"])[1] == ["--other_option"]


@pytest.mark.parametrize("words", (["3", "4"], ["3,4"], ["3,", "4"], ["3", ",", "4"]))
def test_a_list_has_spaces_or_commas_between_its_words(words):
    parser = ProgramParser("")
    parser.add_argument("--sizes", action=Several, type=int, default=[1])
    assert parser.parse_args(["--sizes", *words]).sizes == [3, 4]
    assert parser.parse_args([]).sizes == [1]


def test_a_wrong_word_of_a_list_is_named(capsys):
    parser = ProgramParser("")
    parser.add_argument("--sizes", action=Several, type=int)
    parser.add_argument("--tasks", action=Several, choices=("pope", "gqa"))
    for words, said in (
        (["--sizes", "3,x"], "argument --sizes: invalid int value: '3,x'"),
        (["--tasks", "gqa,pop"], "argument --tasks: unknown choice 'pop' (did you mean 'pope'?)"),
        (["--tasks", "mmstar"], "unknown choice 'mmstar', choose from pope, gqa"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert capsys.readouterr().err.endswith(f"{said}\n")


@pytest.mark.parametrize("words", [[","], [" , ,"], [""], [",", ","]], ids=str)
def test_a_list_without_a_word_is_refused(words, capsys):
    parser = ProgramParser("")
    parser.add_argument("--sizes", action=Several, type=int, default=[1])
    parser.add_argument("--names", action=Several, nargs="*")
    for option in ("--sizes", "--names"):
        with pytest.raises(SystemExit):
            parser.parse_args([option, *words])
        said = f"argument {option}: commas alone name nothing: expected a value\n"
        assert capsys.readouterr().err.endswith(said)
    assert parser.parse_args(["--names"]).names == []
    assert parser.parse_args(["--sizes", "1", ",", "2"]).sizes == [1, 2]


def test_help_says_a_default_that_its_text_leaves_out():
    parser = ProgramParser("")
    parser.add_argument("--rate", default=0, help="the 50 %% rate")
    parser.add_argument("--sizes", default=[1, 2], help="some sizes")
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--name", default="x", help="a name (default: the usual one)")
    text = parser.format_help()
    assert "the 50 % rate (default: 0)" in text and "some sizes (default: 1 2)" in text
    assert text.count("default") == 3


def test_errors_behind_a_script_have_the_name_that_was_typed_and_no_usage(monkeypatch, capsys):
    monkeypatch.setenv(TYPED, "llava eval pope")
    with pytest.raises(SystemExit) as ended:
        run_llava.build_parser().parse_args(["--max-new-tokens", "0"])
    said = "llava eval pope: error: argument --max-new-tokens: 0 must be at least 1\n"
    assert ended.value.code == 2 and capsys.readouterr().err == said
    assert TYPED in (ROOT / "scripts/eval_common.sh").read_text()


def test_a_warning_of_the_package_is_one_line_without_its_place():
    one_line_warnings()
    own = warnings.formatwarning("it is so", UserWarning, run_llava.__file__, 7)
    assert own == "warning: it is so\n"
    assert __file__ in warnings.formatwarning("it is so", UserWarning, __file__, 7)


def test_a_program_for_one_method_says_which_takes_several(capsys):
    for words in (["--methods", "a", "b"], ["--methods", "a,b"], ["--method", "a", "b"]):
        with pytest.raises(SystemExit):
            run_llava.build_parser().parse_args(words)
        said = "one method runs here, --pruning-method a; llava compare --methods a b compares"
        assert said in capsys.readouterr().err


def test_help_begins_with_the_first_line_or_with_all_of_the_text(capsys):
    text = "What it does.\n\n    an example\n"
    assert "an example" not in ProgramParser(text).format_help()
    assert "What it does.\n\n    an example\n" in ProgramParser(text, whole=True).format_help()


@pytest.mark.parametrize(
    "words, said",
    [
        ("--temperature -1", "argument --temperature: -1.0 must be at least 0"),
        ("--temperature nan", "argument --temperature: nan must be at least 0"),
        ("--top_p 7", "argument --top-p: 7.0 must be at least 0 and at most 1"),
        ("--max-new-tokens 0", "argument --max-new-tokens: 0 must be at least 1"),
        ("--num-beams 0", "argument --num-beams: 0 must be at least 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_before_a_model_is_loaded(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        run_llava.build_parser().parse_args(words.split())
    assert ended.value.code == 2 and capsys.readouterr().err.splitlines()[-1].endswith(said)


def test_no_thread_to_prepare_images_is_refused_before_a_model_is_loaded(capsys):
    with pytest.raises(SystemExit):
        program.build_parser("Answers.").parse_args(["--workers", "0"])
    assert "argument --workers: 0 must be at least 1" in capsys.readouterr().err


def test_every_range_belongs_to_options_and_holds_their_defaults():
    """Of a name that several programs have, all mean the same number."""
    options = {name: set() for name in RANGES}
    for path in sorted((ROOT / "llava").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                flags = [a.value for a in node.args if isinstance(a, ast.Constant)]
                words = {key.arg: key.value for key in node.keywords}
                for name in RANGES.keys() & {str(flag)[2:].replace("-", "_") for flag in flags}:
                    options[name].add(ast.unparse(words.get("default", ast.Constant(None))))
    assert all(options.values())
    for name, (least, most) in RANGES.items():
        numbers = [float(value) for value in options[name] if value.replace(".", "").isdigit()]
        assert all(least <= number <= (most or number) for number in numbers), name
