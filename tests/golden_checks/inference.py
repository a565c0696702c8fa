"""Recorded answering programs: the answers file and what is printed."""

import tempfile
from pathlib import Path

from tests.eval import eval_cases
from tests.golden_cases import load_json, locate


def check_inference(case, folder, report):
    """Every recorded command line, run in this process in float32 on the CPU."""
    for run in load_json(case, folder):
        run = with_released_template(run)
        with tempfile.TemporaryDirectory() as scratch:
            problems = eval_cases.inference_differences(
                run, Path(scratch), lambda name: locate(name, folder)
            )
        for problem in problems:
            report.add(f"{run['id']}: {problem}")


def with_released_template(run: dict) -> dict:
    """The recorded run; where the program chose the template, the choice of the release is said.

    The release has a fixed template in every program, or answers for "v1" checkpoints with another
    system text than they were trained with; ours choose the one of the training.
    """
    if "--conv-mode" in run["argv"]:
        return run
    released = "llava_v0" if run["module"].endswith("model_vqa_science") else "llava_v1"
    return {**run, "argv": [*run["argv"], "--conv-mode", released]}
