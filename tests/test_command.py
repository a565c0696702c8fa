"""The command `llava`: one short name for each program."""

import argparse
import ast
import re
import shutil
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest

from llava import command
from llava.eval.benchmarks import all_benchmarks
from llava.model_args import DTYPES
from llava.program_parser import TYPED, typed_command
from tests.paths import ROOT

SETUP = (ROOT / "setup.py").read_text()


def run(capsys, *words) -> tuple[object, str]:
    """(exit code, what was printed)."""
    with pytest.raises(SystemExit) as stop:
        command.main(list(words))
    return stop.value.code, "".join(capsys.readouterr())


def test_the_package_installs_the_command():
    assert '"llava = llava.command:main"' in SETUP


@pytest.mark.parametrize("name", [n for n, c in command.COMMANDS.items() if c.module])
def test_a_command_is_a_program_whose_help_says_its_name(name, monkeypatch, capsys):
    assert callable(import_module(command.COMMANDS[name].module).main)
    code, out = run(capsys, name, "--help")
    assert code == 0 and out.startswith("usage: ")


def test_words_go_to_the_program_as_they_are(monkeypatch):
    seen = []
    program = SimpleNamespace(main=lambda: seen.append(list(sys.argv)))
    monkeypatch.setitem(sys.modules, "llava.pruning.program", program)
    monkeypatch.setattr(sys, "argv", ["bin/llava"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    command.main(["methods", "fastv", "--layers", "32"])
    assert seen == [["llava methods", "fastv", "--layers", "32"]]


def test_without_a_command_all_are_listed_and_nothing_ran(capsys):
    code, out = run(capsys)
    assert code == 2 and all(f"  {name} " in out for name in command.COMMANDS)
    assert run(capsys, "--help")[0] == 0


def test_a_typo_is_one_sentence(capsys):
    code, _ = run(capsys, "metods")
    assert code == "error: unknown command 'metods' (did you mean 'methods'?)"


def test_a_benchmark_is_run_by_its_script(monkeypatch, tmp_path):
    called = {}

    def script(words, env):
        called.update(words=words, env=env)
        return SimpleNamespace(returncode=3)

    monkeypatch.setattr(command.subprocess, "run", script)
    monkeypatch.chdir(tmp_path)
    words = ["pope", "64", "seed=1", "--limit", "9", "--data_dir=data", "--model-path", "a/b"]
    assert command.evaluate([*words, "--pruning-method", "random", "--skip-bad"]) == 3
    assert called["words"][2:] == ["pope", "64", "seed=1", "--skip-bad"]
    expected = {"LIMIT": "9", "DATA_DIR": str(tmp_path / "data"), "CKPT": "a/b", "METHOD": "random"}
    assert expected.items() <= called["env"].items()
    assert called["env"][TYPED] == f"{typed_command()} eval pope"
    assert set(command.VARIABLES.values()) <= set(
        re.findall(r"\$\{(\w+)", (ROOT / "scripts/eval_common.sh").read_text())
    )


@pytest.mark.parametrize(
    "words, said",
    [
        (["eval", "pop"], "unknown benchmark 'pop' (did you mean 'pope'?)"),
        (["eval", "pope", "--limit"], "--limit needs a value"),
    ],
)
def test_bad_input_to_a_benchmark_is_one_sentence(words, said, capsys):
    code, _ = run(capsys, *words)
    assert code.startswith("error: ") and said in code


def test_the_help_of_eval_lists_options_and_benchmarks(capsys):
    code, out = run(capsys, "eval", "--help")
    assert code == 0 and all(flag in out for flag in (*command.VARIABLES, "--dtype"))
    names = [name for name in all_benchmarks() if not name.startswith("viscot_")]
    assert all(re.search(rf"(^|\s){re.escape(name)},", out) for name in names)
    assert run(capsys, "eval")[0] == 2


def test_an_installed_package_without_scripts_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="come with a clone of the repository"):
        command.evaluate(["pope"])


@pytest.mark.slow
def test_a_benchmark_of_the_playground_ends_with_its_score(tmp_path):
    words = "eval pope 64 --pruning-method random --limit 4".split()
    shutil.copytree(ROOT / "playground/benchmark", tmp_path / "data")
    folder = ["--data-dir", "data"]
    done = subprocess.run(
        [sys.executable, "-m", "llava", *words, *folder, "seed=7"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert '"benchmark": "pope"' in done.stdout.splitlines()[-1]


def calls_with(flag: str) -> list[tuple[str, dict]]:
    """(file, keywords) of every call in the package that adds an option of this name with one
    value."""
    found = []
    for path in sorted((ROOT / "llava").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and any(
                isinstance(arg, ast.Constant) and arg.value == flag for arg in node.args
            ):
                words = {key.arg: ast.unparse(key.value) for key in node.keywords}
                if (
                    words.keys() & {"type", "choices", "help", "default"}
                    and words.get("action") is None
                ):
                    found.append((str(path.relative_to(ROOT)), words))
    return found


@pytest.mark.parametrize(
    "flag, key, value",
    [
        ("--dtype", "choices", "DTYPES"),
        ("--limit", "type", "int"),
        ("--visual-token-num", "type", "int"),
    ],
)
def test_an_option_takes_the_same_in_every_program(flag, key, value):
    calls = calls_with(flag)
    assert calls and [file for file, words in calls if words.get(key) != value] == []


def test_types_of_numbers_have_both_of_their_names():
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", choices=DTYPES)
    for pair in (("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")):
        one, other = (DTYPES[parser.parse_args(["--dtype", name]).dtype] for name in pair)
        assert one is other


def test_the_readme_names_every_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`llava {name}" in readme for name in command.COMMANDS)
