"""Where a pruning method's recorded cases need more than the common comparison.

`tests/golden_checks/<method>.py` may define
build(case, folder) -> Pruner   recorded `args` to our options; default: `args` are our options
check(case, recorded, model, pruner, pixels, trace, report) -> bool
                                compares fields of its own; returns whether the recorded selection
                                must be, and was, reproduced, so that all that follows compares too
FUNCTIONS                       function name -> (case, folder, recorded, report), which compares a
                                selection on recorded inputs
check_<kind>(case, folder, report)
                                a kind of case that this method alone has
"""

import importlib
import importlib.util

from llava.pruning import Pruner, build_pruner
from tests.golden_cases import load_arrays


def module_of(case):
    """The module of the case's method, or None."""
    name = case.get("method", "none").rstrip("+").replace("-", "_")
    name = f"tests.golden_checks.{name}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def build(case, folder) -> Pruner:
    module, method = module_of(case), case.get("method", "none")
    if hasattr(module, "build"):
        return module.build(case, folder)
    return build_pruner(method, **({} if method == "none" else case["args"]))


def method_check(case):
    """The method's own check of a whole-model case, or None."""
    return getattr(module_of(case), "check", None)


def check_function(case, folder, report):
    """The selection alone, on recorded inputs."""
    name = case.get("function") or case["args"].get("function", "select")
    functions = getattr(module_of(case), "FUNCTIONS", {})
    if name not in functions:
        report.add(f"function {name!r} of {case['method']!r} is not supported")
        return
    functions[name](case, folder, load_arrays(case, folder), report)
