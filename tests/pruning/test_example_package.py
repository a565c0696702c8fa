"""The package of docs/Adding_a_Method.md, installed and used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.paths import ROOT
from tests.pruning.packages import EXAMPLE, install_example


def test_the_page_shows_the_files_of_the_example():
    page = (ROOT / "docs" / "Adding_a_Method.md").read_text()
    shown = dict(re.findall(r"^`([\w.]+)`[^\n]*:\n\n```\w+\n(.*?)^```", page, re.S | re.M))
    files = {path.name: path.read_text() for path in EXAMPLE.iterdir() if path.is_file()}
    assert shown == files and len(files) == 3
    assert len(files["test_uniform.py"].splitlines()) == 5


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """The environment of a process in which the example is installed."""
    return install_example(tmp_path_factory.mktemp("installed"))


def run(environment: dict[str, str], *command) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_own_tests_pass_without_any_file_of_ours(installed, tmp_path):
    shutil.copy(EXAMPLE / "test_uniform.py", tmp_path)
    out = run(installed, sys.executable, "-m", "pytest", "-q", tmp_path, f"--rootdir={tmp_path}")
    assert int(re.search(r"(\d+) passed", out)[1]) >= 18 and "skipped" not in out


def test_run_llava_takes_it_like_any_other(installed, tmp_path):
    options = "--pruning-method uniform --visual-token-num 64 --phase 0 --temperature 0".split()
    command = [sys.executable, "-m", "llava.eval.run_llava", *options]
    out = run(installed, *command, "--show-pruning", tmp_path / "kept.png")
    assert out.strip() and (tmp_path / "kept.png").exists()


@pytest.mark.slow
def test_an_evaluation_script_takes_its_name_and_its_options(installed, tmp_path):
    for folder in ("pope", "images"):
        shutil.copytree(ROOT / "playground/benchmark" / folder, tmp_path / folder)
    environment = {**installed, "METHOD": "uniform", "LIMIT": "2", "DATA_DIR": str(tmp_path)}
    out = run(environment, "bash", "scripts/v1_5/eval/pope.sh", "64", "phase=0.25")
    summary = json.loads(out.splitlines()[-1])
    assert summary["answers_file"].endswith("/uniform/n_64_phase=0.25_limit2.jsonl")
    assert summary["visual_tokens"] == 64
