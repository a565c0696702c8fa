"""The table of benchmarks: one word for each file of this folder that holds one.

A file says everything about its benchmark in `BENCHMARKS`, one entry per split or language. Files
are imported when the table is first asked, so that each of them can be started as a program.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from llava.spelling import unknown

if TYPE_CHECKING:
    from llava.eval.benchmarks.benchmark import Benchmark

FILES = (
    "pope",
    "textvqa",
    "gqa",
    "vqav2",
    "vizwiz",
    "mmbench",
    "mme",
    "seed",
    "sqa",
    "qbench",
    "refcoco",
    "llavabench",
    "mmvet",
    "viscot",
)


@cache
def all_benchmarks() -> dict[str, Benchmark]:
    """Returns every benchmark by name, in the order of the table."""
    modules = (import_module(f"{__name__}.{name}") for name in FILES)
    return {entry.name: entry for module in modules for entry in module.BENCHMARKS}


def scored_here() -> dict[str, Benchmark]:
    """Returns the benchmarks with a scorer of their own; the others need a judge or a server."""
    return {name: entry for name, entry in all_benchmarks().items() if entry.units}


def find_benchmark(name: str) -> Benchmark:
    """Returns a benchmark by name; the split it has without one may be said (`refcoco_val`).

    Raises ValueError listing the names.
    """
    known = all_benchmarks()
    short = name.removesuffix("_val").removesuffix("_dev")
    if found := known.get(name) or known.get(short):
        return found
    base, _, split = name.rpartition("_")
    if base in known:
        splits = [n.removeprefix(f"{base}_") for n in known if n.startswith(f"{base}_")]
        others = f"choose from {', '.join(splits)}, or" if splits else "which has one only:"
        raise ValueError(f"unknown split {split!r} of {base}, {others} name none")
    raise ValueError(unknown("benchmark", name, known))
