"""Mistakes of the user end a program with one sentence."""

import re
import subprocess
import sys

import pytest

from llava import errors
from llava.errors import errors_as_messages
from llava.model import apply_delta, consolidate, make_delta
from tests.paths import ROOT


def test_a_file_that_the_system_refuses_is_named_without_a_number(tmp_path):
    with pytest.raises(SystemExit) as ended, errors_as_messages():
        open(tmp_path / "nowhere.jsonl")
    assert ended.value.code == f"error: {tmp_path}/nowhere.jsonl: No such file or directory"
    with pytest.raises(SystemExit) as ended, errors_as_messages():
        open(tmp_path)
    assert ended.value.code == f"error: {tmp_path}: Is a directory"


def test_extras_are_installed_as_the_package_was(monkeypatch, tmp_path):
    assert errors.how_to_install("serve") == "pip install -e '.[serve]'"
    monkeypatch.setattr(errors, "CLONE", tmp_path)  # where no setup.py is
    assert errors.how_to_install("serve") == "pip install 'FILE.whl[serve]'"


def test_no_other_message_names_a_way_of_its_own():
    way = re.compile(r"pip install -e|\.\[\w+\]'")
    files = (ROOT / "llava").rglob("*.py")
    assert [path.name for path in files if way.search(path.read_text())] == []


def test_an_interrupted_program_says_so_and_ends_as_shells_expect(capsys):
    with pytest.raises(SystemExit) as ended, errors_as_messages():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "\nstopped (Ctrl-C)\n"


@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_reader_that_stops_early_gets_no_traceback(lines):
    code = f"""
from llava.errors import errors_as_messages
with errors_as_messages():
    input()
    for _ in range({lines}):
        print("a line")
"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    program = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes)
    program.stdout.close()
    program.stdin.write("\n")
    program.stdin.close()
    assert program.stderr.read() == ""
    assert program.wait() == 141


@pytest.mark.parametrize("streams", ["sys.stdout = None", "sys.stdout.close()"])
def test_a_program_without_any_output_ends_well(streams):
    """As one whose streams were closed before it began, or by the program."""
    code = f"""
import sys
from llava.errors import errors_as_messages
with errors_as_messages():
    {streams}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_messages_of_other_errors_are_said_as_they_are():
    for error in (ValueError("too much"), OSError("no space"), ImportError("no package")):
        with pytest.raises(SystemExit, match=f"^error: {error}$"), errors_as_messages():
            raise error
    with (
        pytest.raises(KeyError),
        errors_as_messages(),
    ):  # a fault of the program keeps its traceback
        raise KeyError("fault")


@pytest.mark.parametrize(
    "program, words",
    [
        (consolidate, "--src ./nowhere --dst out"),
        (apply_delta, "--base ./nowhere --target out --delta ./nowhere"),
        (make_delta, "--base ./nowhere --target ./nowhere --delta out"),
    ],
)
def test_programs_name_a_checkpoint_that_is_not_there(program, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["program", *words.split()])
    with pytest.raises(SystemExit, match=r"^error: .*\./nowhere"):
        program.main()
