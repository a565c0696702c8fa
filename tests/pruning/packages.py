"""Installed packages that bring pruning methods, made up for a test."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT

EXAMPLE = ROOT / "docs" / "examples" / "llava-pruning-uniform"

#: a method that keeps as many tokens as it is told, from the first on
FIRST = """
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

from llava.pruning import SelectPruner


@dataclass
class First(SelectPruner):
    visual_token_num: int = 16
    step: int = 1
    list_file: Optional[str] = None
    folder: Optional[Path] = None

    name = "first"

    def select(self, vision):
        index = torch.arange(self.num_keep(vision), device=vision.features.device)
        return index.expand(len(vision.features), -1)
"""


def install(folder: Path, package: str, points: dict[str, str], **modules: str) -> None:
    """Writes a package into `folder`, as if it had been installed there.

    points: name of a method -> "module:class"; modules: name -> source
    """
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[llava.pruning]", *lines, ""]))
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)


def install_example(folder: Path) -> dict[str, str]:
    """Installs the package of docs/examples with pip, below `folder`; the variables of a process
    that has it."""
    source = shutil.copytree(EXAMPLE, folder / "source")
    options = "--no-deps --no-build-isolation --no-index --disable-pip-version-check --quiet"
    command = [sys.executable, "-m", "pip", "install", *options.split(), str(source)]
    subprocess.run([*command, "--target", str(folder / "site")], check=True)
    return {"PYTHONPATH": f"{ROOT}:{folder / 'site'}", "PYTHON": sys.executable}
