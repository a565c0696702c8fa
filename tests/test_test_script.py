"""scripts/test.sh: quick tests in two processes, the others in one."""

import os
import subprocess

import pytest

from tests.paths import ROOT

SCRIPT = ROOT / "scripts" / "test.sh"
PARALLEL = "-n 2 --dist loadfile"
INTERPRETER = """#!/usr/bin/env bash
case "$1" in
-c) exit {xdist} ;;
-m) echo "threads: $OMP_NUM_THREADS"; echo "$@" ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    """run(*arguments, xdist=True) -> (threads, the command) of an interpreter that shows both."""

    def run(*arguments, xdist=True):
        python = tmp_path / "python"
        python.write_text(INTERPRETER.format(xdist=0 if xdist else 1))
        python.chmod(0o755)
        environment = {**os.environ, "PYTHON": str(python)}
        environment.pop("OMP_NUM_THREADS", None)
        done = subprocess.run(
            ["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        threads, command = done.stdout.splitlines()[-2:]
        return threads.removeprefix("threads: "), command

    return run


def test_the_quick_tests_run_in_two_processes_of_one_thread(run):
    assert run() == ("1", f"-m pytest {PARALLEL}")


def test_a_number_of_processes_that_is_given_comes_last_and_wins(run):
    assert run("-n", "4", "tests")[1] == f"-m pytest {PARALLEL} -n 4 tests"


def test_marked_tests_run_in_one_process(run):
    assert run("-m", "slow and not gpu")[1] == "-m pytest -m slow and not gpu"


def test_an_environment_without_the_plugin_runs_them_in_one_process(run):
    assert run(xdist=False)[1] == "-m pytest"
