"""Recorded answering programs: the answers file and what is printed."""

import tempfile
from pathlib import Path

from tests import eval_cases
from tests.golden_cases import load_json, locate


def check_inference(case, folder, report):
    """Every recorded command line, run in this process in float32 on the CPU."""
    for run in load_json(case, folder):
        with tempfile.TemporaryDirectory() as scratch:
            problems = eval_cases.inference_differences(
                run, Path(scratch), lambda name: locate(name, folder)
            )
        for problem in problems:
            report.add(f"{run['id']}: {problem}")
