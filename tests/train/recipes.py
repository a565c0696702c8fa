"""Asks a recipe in scripts/ what it would start, without starting it."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.paths import ROOT

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# With all of them given, no interpreter is started to ask the device.
GIVEN = {"BF16": "True", "TF32": "False", "PROGRAM": "train.py"}


def run_recipe(script, *words, folder=None, **environment):
    """The finished process of `bash scripts/SCRIPT WORD ...`, its launcher an `echo`."""
    given = {"LAUNCHER": "echo", "PYTHON": sys.executable, **GIVEN, **environment}
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *map(str, words)],
        env=os.environ | {key: str(value) for key, value in given.items()},
        cwd=folder,
        capture_output=True,
        text=True,
    )


def words_of(script, *words, **environment):
    """For each program that a recipe would start: [program, word, ...]."""
    done = run_recipe(script, *words, **environment)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]
