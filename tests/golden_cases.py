"""Runs recorded reference cases: `python -m tests.golden_cases FOLDER [FOLDER ...]`.

A folder holds an `index.json` (list of cases) and the files it names. Checkpoints and images are
looked for beside the folder, then in `tests/golden`, then in `../shared/golden`. For every folder
the differences and matched/total are printed; the exit status is 0 only when all cases match. With
`--compile` steps of decoding are compiled, with `--compile-prompts` layers on prompts and of vision
towers.

A new method needs a file in `tests/golden_checks/` when its recorded `args` are not the options of
our class (see `methods.py` there); a new kind needs an entry in `CHECKS`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from llava.pruning import Pruner
from tests.golden_checks.compare import Report
from tests.paths import ROOT

SHIPPED = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared" / "golden"

#: kind of case -> module in tests/golden_checks and function in it
CHECKS = {
    "e2e": ("e2e", "check_single"),
    "e2e-batch": ("e2e", "check_batch"),
    "function": ("methods", "check_function"),
    "prompts": ("text", "check_prompts"),
    "text": ("text", "check_text"),
    "preprocess": ("preprocess", "check_preprocess"),
    "vision": ("vision", "check_vision"),
    "scoring": ("scoring", "check_scoring"),
    "inference": ("inference", "check_inference"),
    "training": ("training", "check_training"),
    "loading": ("loading", "check_loading"),
    "serving": ("serving", "check_serving"),
    "qwen-plain": ("qwen2_5_vl", "check_plain"),
    "qwen-parts": ("qwen2_5_vl", "check_parts"),
}

#: other names of kinds
KIND_NAMES = {"fn": "function", "e2e_batch": "e2e-batch"}


def load_cases(folder: str | Path, every: bool = False) -> list[dict]:
    """The cases in the index of `folder` that are to be matched, or `every` one."""
    with open(Path(folder) / "index.json", encoding="utf-8") as file:
        index = json.load(file)
    cases = index if isinstance(index, list) else index["cases"]
    cases = [completed(case) for case in cases]
    return [case for case in cases if every or not no_target(case)]


def completed(case: dict) -> dict:
    """A case with the fields that some folders leave out."""
    whole = "e2e"
    if is_qwen(case):
        whole = "qwen-plain" if case.get("method") == "none" else "qwen"
    kind = case.get("kind") or whole
    return {**case, "kind": KIND_NAMES.get(kind, kind), "args": case.get("args") or {}}


def no_target(case: dict) -> str | None:
    """Why a case is not to be matched, or None."""
    if case["args"].get("variant") == "released":
        return "records defects of a release"
    if case["kind"] == "qwen" and check_of(case) is None:
        return "needs a pruning method on Qwen2.5-VL"
    return None


def is_qwen(case: dict) -> bool:
    return "qwen" in f"{case.get('checkpoint')} {(case.get('args') or {}).get('model')}"


def locate(name: str, folder: str | Path) -> Path:
    """A checkpoint, trained part, image or file by name, as seen from a folder of cases."""
    folder = Path(folder).resolve()
    roots = [folder, folder / "images"]
    for root in (folder.parent, SHIPPED, SHARED):
        roots += [root, root / "images", root / folder.name]
    for root in roots:
        if (root / name).exists():
            return root / name
    others = (path for root in (folder.parent, SHIPPED, SHARED) for path in root.glob(f"*/{name}"))
    if found := next(others, None):  # beside the cases of another method
        return found
    raise FileNotFoundError(f"{name} is neither beside {folder} nor in {SHIPPED} or {SHARED}")


def load_arrays(case: dict, folder: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a case's npz file."""
    with np.load(Path(folder) / case["file"]) as arrays:
        return dict(arrays)


def load_json(case: dict, folder: str | Path):
    """The content of a case's JSON file."""
    return json.loads((Path(folder) / case["file"]).read_text(encoding="utf-8"))


def build_from_case(case: dict, folder: str | Path) -> Pruner:
    """The pruning method a recorded case was made with."""
    from tests.golden_checks.methods import build

    return build(case, Path(folder))


def check_of(case: dict):
    """The function that checks a case: that of its method for this kind, else that of the kind."""
    from tests.golden_checks.methods import module_of

    own = getattr(module_of(case), f"check_{case['kind']}", None)
    if own is not None or case["kind"] not in CHECKS:
        return own
    module, function = CHECKS[case["kind"]]
    return getattr(importlib.import_module(f"tests.golden_checks.{module}"), function)


def run_case(case: dict, folder: str | Path) -> list[str]:
    """What differs between a recorded case and ours; an empty list when it matches."""
    check = check_of(case)
    if check is None:
        return [f"cases of kind {case['kind']!r} are not supported"]
    report = Report()
    try:
        check(case, Path(folder), report)
    except Exception as error:  # one broken case must not hide the others
        report.add(f"{type(error).__name__}: {error}")
    return report.problems


def run_folder(folder: str | Path) -> tuple[int, int]:
    """(matched, total) of one folder; prints what differs and what is not to be matched."""
    cases = load_cases(folder)
    matched = 0
    for case in cases:
        problems = run_case(case, folder)
        matched += not problems
        for problem in problems[:10]:
            print(f"{Path(folder).name}/{case['id']}: {problem}")
        if len(problems) > 10:
            print(f"{Path(folder).name}/{case['id']}: and {len(problems) - 10} more differences")
    left_out = Counter(map(no_target, load_cases(folder, every=True)))
    for reason, count in left_out.items():
        if reason:
            print(f"{Path(folder).name}: {count} cases not run, each {reason}")
    print(f"{folder}: {matched}/{len(cases)}", flush=True)
    return matched, len(cases)


def main(arguments: list[str] | None = None) -> int:
    from tests.golden_checks.models import compiling

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folder with an index.json")
    parser.add_argument("--compile", action="store_true", help="with compiled steps of decoding")
    what = "with compiled layers on prompts and of towers"
    parser.add_argument("--compile-prompts", action="store_true", help=what)
    args = parser.parse_args(arguments)
    folders = args.folders
    if missing := [name for name in folders if not (Path(name) / "index.json").is_file()]:
        parser.error(f"no index.json in {', '.join(missing)}")
    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
    with compiling(decoding=args.compile, prefill=args.compile_prompts):
        counts = [run_folder(name) for name in folders]
    matched, total = (sum(column) for column in zip(*counts, strict=True))
    print(f"total: {matched}/{total}")
    return 0 if matched == total else 1


if __name__ == "__main__":
    sys.exit(main())
