"""What a GPU really runs for a further token: kernels, copies and launches, by torch's profiler."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

#: what an event of a trace is -> the category the profiler writes
KINDS = {"kernels": "kernel", "copies": "gpu_memcpy", "fills": "gpu_memset"}
#: calls of the host that start something on the device; a graph of many kernels is one
STARTS = ("LaunchKernel", "GraphLaunch", "cudaMemcpy", "cudaMemset")
HOST = ("cuda_runtime", "cuda_driver")
#: answers of these lengths are compared, so that the prompt drops out
SHORT, LONG = 4, 20
#: kernels that are named, those that take the longest
MOST = 12


def events_of(trace: dict) -> tuple[Counter, Counter]:
    """(how many of each of `KINDS` and of "launches", microseconds by kernel) of a trace."""
    counts, spent = Counter(), Counter()
    kinds = {category: kind for kind, category in KINDS.items()}
    for event in trace["traceEvents"]:
        category, name = event.get("cat"), event.get("name", "")
        if category in kinds:
            counts[kinds[category]] += 1
            if category == KINDS["kernels"]:
                spent[name] += event.get("dur", 0)
        elif category in HOST and any(start in name for start in STARTS):
            counts["launches"] += 1
    return counts, spent


def traced(work, device: torch.device) -> dict:
    """The trace of `work()` on a GPU, as Chrome shows it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            work()
            torch.cuda.synchronize(device)
        seen.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))


def profile_tokens(model, workload) -> dict:
    """What the device runs for one further token of `workload` with the method in use.

    `per_token` (kernels, copies, fills, launches: calls of the host that start something), and
    `busy_ms`, the time of its kernels; `top`: the `MOST` kernels that take the longest, with
    microseconds per token.
    """
    found = []
    for length in (SHORT, LONG):
        asked = replace(workload, num_tokens=length)
        asked.run(model)  # what is compiled or captured once
        found.append(events_of(traced(lambda asked=asked: asked.run(model), model.device)))
    (few, few_spent), (many, many_spent) = found
    tokens, spent = LONG - SHORT, many_spent
    spent.subtract(few_spent)
    names = (*KINDS, "launches")
    return {
        "per_token": {name: (many[name] - few[name]) / tokens for name in names},
        "busy_ms": sum(spent.values()) / tokens / 1000,
        "top": [(name, total / tokens) for name, total in spent.most_common(MOST)],
    }
