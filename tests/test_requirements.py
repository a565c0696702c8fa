"""What is needed can be installed with every Python the package is for; asks the registry."""

import re
import runpy
import subprocess
import sys

import pytest
import setuptools

from tests.paths import ROOT

#: built from source where they are installed, or for a GPU
NOT_ASKED = ("deepspeed", "flash-attn", "torch", "bitsandbytes")


@pytest.fixture
def told(monkeypatch):
    """What setup.py says."""
    found = {}
    monkeypatch.setattr(setuptools, "setup", found.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return found


def pythons(told) -> list[str]:
    first, behind = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", told["python_requires"]).groups()
    return [f"3.{minor}" for minor in range(int(first), int(behind))]


def test_the_readme_names_the_pythons_of_setup(told):
    known = pythons(told)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Needs Python {known[0]} to {known[-1]} " in readme


@pytest.mark.network
def test_every_requirement_has_a_version_for_every_python(told, tmp_path):
    wanted = [*told["install_requires"], *sum(told["extras_require"].values(), [])]
    wanted = [own for own in dict.fromkeys(wanted) if not own.startswith(NOT_ASKED)]
    assert len(wanted) > 20
    for python in pythons(told):
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet"]
        pip += ["--python-version", python, "--only-binary=:all:", "--target", str(tmp_path)]
        done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
        assert done.returncode == 0, f"Python {python}: {done.stderr[-1000:]}"
