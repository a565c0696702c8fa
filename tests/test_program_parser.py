"""Usage and errors of a program name what the user typed, and say what was probably meant."""

import ast
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llava import command
from llava.program_parser import ProgramParser, typed_command
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
    """The only other one never prints anything: it picks options out of a script's words."""
    others = []
    for path in sorted((ROOT / "llava").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ArgumentParser"):
                others.append((path.name, [key.arg for key in node.keywords]))
    assert others == [("script_args.py", ["add_help", "allow_abbrev"])]


def test_help_begins_with_the_first_line_or_with_all_of_the_text(capsys):
    text = "What it does.\n\n    an example\n"
    assert "an example" not in ProgramParser(text).format_help()
    assert "What it does.\n\n    an example\n" in ProgramParser(text, whole=True).format_help()
