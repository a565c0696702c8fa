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

import torch

from llava.pruning import Pruner, VisionTokens, build_pruner
from tests.golden_cases import load_arrays

#: a crop of the tiny checkpoints has 24 x 24 patches
PATCHES = 576
#: crops that share a budget on LLaVA-NeXT: an overview and 2 x 2 tiles
NEXT_CROPS = 5


def budget(case, crops: int = 1) -> int:
    """The recorded tokens of one crop, as tokens of an image of `crops` crops.

    More than a crop has are all of them: released code takes such budgets, ours refuses them.
    Functions have sizes of their own.
    """
    tokens = case["args"]["visual_token_num"]
    return tokens if case["kind"] == "function" else min(tokens, PATCHES) * crops


def given(args: dict, *names: str, **renamed: str) -> dict:
    """The options among `args` that are recorded with a value; renamed: theirs -> ours."""
    renamed = {name: name for name in names} | renamed
    return {ours: args[name] for name, ours in renamed.items() if args.get(name) is not None}


def tensors(recorded: dict, *names: str) -> list[torch.Tensor]:
    """Recorded numbers of half precision or bytes as fp32."""
    return [torch.tensor(recorded[name]).float() for name in names]


def tokens_of(features: torch.Tensor, **fields) -> VisionTokens:
    """Recorded features (B, N, C) as a method is given them, each an image of one row."""
    batch, count = features.shape[:2]
    places = torch.arange(count).expand(batch, -1)
    return VisionTokens(features=features, positions=places, grid=(1, count), **fields)


def check_order(order, recorded, report) -> None:
    """Recorded picks in their order, and as a set; rows may be padded with -1."""
    for name, own in (("expected_order", order), ("expected_keep", order.sort(dim=1).values)):
        report.equal(name, own, recorded[name][:, : own.shape[1]])
        report.true(f"{name} has more", (recorded[name][:, own.shape[1] :] == -1).all())


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
        known = ", ".join(functions) or "none"
        report.add(f"function {name!r} of {case['method']!r} is not supported, only {known}")
        return
    functions[name](case, folder, load_arrays(case, folder), report)
