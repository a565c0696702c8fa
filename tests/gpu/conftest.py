"""Checks of a CUDA device: `python -m pytest -m gpu`.

A check that needs no GPU runs on the CPU as well, in the quick tests, with one or a few cases: so
what stands here works before anybody waits for a GPU.
"""

from __future__ import annotations

import json
import os

import pytest
import torch

from llava.eval.gpu_report.runner import TESTS_FILE
from tests.gpu.sides import CUDA_ALONE, DEVICES, usable


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    """The CPU, and with `-m gpu` the first CUDA device."""
    return usable(request.param)


@pytest.fixture(params=CUDA_ALONE)
def cuda(request) -> torch.device:
    """The first CUDA device, for what a CPU cannot show."""
    return usable(request.param)


@pytest.fixture(autouse=True)
def plain_float32():
    """Convolutions of float32 take TF32 on a GPU unless told otherwise; other products do not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def note(request):
    """note(text) keeps what a test found for the report of the run."""
    return lambda text: request.node.user_properties.append(("note", text))


def pytest_runtest_logreport(report):
    """One line of JSON for every test of this folder as it ends, for `llava.eval.gpu_report`."""
    path = os.environ.get(TESTS_FILE)
    if path is None or (report.when != "call" and report.outcome == "passed"):
        return
    reason = ""
    if report.outcome == "skipped":
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
    elif report.outcome == "failed":
        lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
        reason = (lines or report.longreprtext.splitlines()[-1:] or [""])[0].lstrip("E ")[:300]
    line = {
        "test": report.nodeid.removeprefix("tests/gpu/"),
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "reason": reason,
        "notes": [text for name, text in report.user_properties if name == "note"],
    }
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
