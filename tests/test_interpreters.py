"""Which interpreter the scripts start, where there are several, and what they say without one."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.paths import ROOT
from tests.train.recipes import GIVEN, needs_bash

pytestmark = needs_bash
TRAIN, EVALUATE, TEST = "v1_5/pretrain.sh", "v1_5/eval/pope.sh", "test.sh"
INTERPRETER = """#!/bin/sh
case "$*" in
"- "*) echo {lacks} ;;
"-c "*) exit {fails} ;;
*data_files*) echo "SOURCE=. QUESTIONS=q.jsonl IMAGES=. PROGRAM=answer VARIANT=" ;;
*) echo "$0: $*"; echo "sees $PYTHONPATH" ;;
esac
"""


def interpreter(path, lacks="", fails=0):
    """A python that tells how it was started; it lacks modules, or fails at `python -c`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(INTERPRETER.format(lacks=lacks, fails=fails))
    path.chmod(0o755)
    return path


@pytest.fixture
def clone(tmp_path):
    """A clone whose path is several words, with nothing but scripts."""
    folder = tmp_path / "a clone"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    shutil.copy(ROOT / "setup.py", folder)
    return folder


@pytest.fixture
def start(clone, tmp_path):
    """start(script, **environment) -> the finished process; no python on its PATH has torch."""
    system = tmp_path / "system"
    for name in ("python", "python3", "python3.10", "python3.11", "python3.12"):
        interpreter(system / name, lacks="torch")
    alone = dict.fromkeys(("PYTHON", "VIRTUAL_ENV", "CONDA_DEFAULT_ENV", "PYTHONPATH"), "")

    def start(script, *words, folder=tmp_path, path="", **environment):
        search = f"{path}:{system}:{os.defpath}"
        return subprocess.run(
            ["bash", script if "scripts/" in script else str(clone / "scripts" / script), *words],
            env={**os.environ, **alone, **GIVEN, "PATH": search, **environment},
            cwd=folder,
            capture_output=True,
            text=True,
        )

    return start


@pytest.mark.parametrize("script", [TRAIN, EVALUATE])
def test_without_the_project_a_script_says_how_to_name_an_interpreter(start, script):
    done = start(script)
    assert done.returncode == 1
    assert "error: python3 lacks: torch\nActivate the environment" in done.stderr


def test_another_transformers_is_one_that_is_lacking(start, tmp_path):
    site = tmp_path / "site"
    (site / "transformers-5.0.0.dist-info").mkdir(parents=True)
    (site / "transformers-5.0.0.dist-info/METADATA").write_text(
        "Name: transformers\nVersion: 5.0.0\n"
    )
    done = start(TRAIN, PYTHON=sys.executable, PYTHONPATH=str(site))
    assert done.returncode == 1 and "lacks: transformers==4.37.2\n" in done.stderr


@pytest.mark.parametrize("script", [TRAIN, EVALUATE, TEST])
def test_one_that_does_not_start_is_named(start, script):
    done = start(script, PYTHON="/no/python")
    assert done.returncode == 1
    assert "error: /no/python does not start; set PYTHON=/path/to/python" in done.stderr


@pytest.mark.parametrize("script", [TRAIN, EVALUATE, TEST])
def test_it_is_the_one_given_or_activated_or_that_of_the_clone(start, clone, tmp_path, script):
    own = interpreter(clone / ".venv/bin/python")
    for environment in ({}, {"CONDA_DEFAULT_ENV": "base"}):
        assert f"{own}: -m " in start(script, **environment).stdout
    active = interpreter(tmp_path / "active/python")
    for environment in ({"VIRTUAL_ENV": "active"}, {"CONDA_DEFAULT_ENV": "active"}):
        assert f"{active}: -m " in start(script, path=active.parent, **environment).stdout
    given = interpreter(tmp_path / "given one/python")
    assert f"{given}: -m " in start(script, PYTHON=str(given), VIRTUAL_ENV="active").stdout
    relative = start(script, PYTHON="../given one/python", folder=active.parent)
    assert "given one/python: -m " in relative.stdout


@pytest.mark.parametrize("script", [TRAIN, EVALUATE])
def test_the_program_is_the_one_of_the_clone(start, clone, script):
    interpreter(clone / ".venv/bin/python")
    done = start(script, PYTHONPATH="/elsewhere")
    assert f"sees {clone}:/elsewhere" in done.stdout


def test_results_of_the_quickstart_go_where_they_are_wanted_from(start, clone, tmp_path):
    own = interpreter(tmp_path / "python")
    done = start("quickstart.sh", PYTHON=str(own), OUT="my results")
    assert done.returncode == 0 and f"--out {tmp_path}/my results\n" in done.stdout, done.stderr
    assert (tmp_path / "my results").is_dir()


@pytest.mark.parametrize("script", ["quickstart.sh", "test_vllm.sh"])
def test_a_script_that_installs_explains_itself_before_it_does(start, script):
    done = start(script, "--help")
    assert done.returncode == 0 and not done.stderr
    assert f"    bash scripts/{script} " in done.stdout and "python" in done.stdout


def test_the_quickstart_passes_over_no_word(start):
    done = start("quickstart.sh", "LIMIT=300")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: 'LIMIT=300' is not understood; settings go in front: ")


@pytest.mark.parametrize("script", [TRAIN, EVALUATE, TEST])
def test_cdpath_leads_to_no_other_clone(start, clone, tmp_path, script):
    interpreter(clone / ".venv/bin/python")
    (tmp_path / "other/scripts/v1_5/eval").mkdir(parents=True)
    done = start(f"scripts/{script}", folder=clone, CDPATH=str(tmp_path / "other"))
    assert f"{clone}/.venv/bin/python: -m " in done.stdout, done.stderr


def test_launchers_are_those_of_the_interpreter(start, clone, tmp_path):
    own = interpreter(clone / ".venv/bin/python")
    elsewhere = interpreter(tmp_path / "elsewhere/deepspeed").parent
    done = start(TRAIN, path=elsewhere)
    assert f"{own}: -m deepspeed.launcher.runner llava/train/train.py" in done.stdout
    done = start("v1_5/train_glimpse.sh")
    assert f"{own}: -m llava.train.train_glimpseprune --config" in done.stdout
    done = start("qwen2_5_vl/train_glimpse_plus.sh", CHECK="true")
    assert f"{own}: -m accelerate.commands.launch --num_processes 4 -m llava." in done.stdout
    done = start("qwen2_5_vl/train_glimpse_plus.sh", "1")
    assert f"{own}: -m llava.train.reinforcement.judge_load --requests 1" in done.stdout
    done = start(TRAIN, LAUNCHER=f"{elsewhere}/deepspeed --num_gpus 2")
    assert f"{elsewhere}/deepspeed: --num_gpus 2 llava/train/train.py" in done.stdout


def test_a_launcher_that_is_missing_is_named(start, clone):
    interpreter(clone / ".venv/bin/python", fails=1)
    done = start(TRAIN)
    assert done.returncode == 1 and "lacks deepspeed: " in done.stderr
    assert "pip install -e '.[train,deepspeed]'" in done.stderr


def test_an_environment_that_has_everything_is_not_installed_into(start, clone, tmp_path):
    active, own = tmp_path / "active/python", clone / ".venv/bin/python"
    interpreter(active)
    done = start(TEST, path=active.parent, VIRTUAL_ENV="active").stdout
    assert f"Using the activated environment: {active}" in done
    interpreter(own)
    interpreter(active, lacks="pytest")
    done = start(TEST, path=active.parent, VIRTUAL_ENV="active").stdout
    assert f"{own}: -m pytest" in done and "-m pip install" not in done
    interpreter(own, lacks="pytest")
    done = start(TEST, path=active.parent, VIRTUAL_ENV="active").stdout
    assert f"{own}: -m pytest" in done and ".venv/bin/python: -m pip install" in done
    assert "Installing torch" not in done  # whatever torch is there was chosen by somebody
    assert "Environment: .venv (up to date)" in start(TEST).stdout
