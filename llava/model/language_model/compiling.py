"""Functions through torch.compile: what has to be there, and one compiled function for each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch

#: numbers of rows, guesses, types and devices make a graph each; torch gives up at 8
MOST_GRAPHS = 64


@cache
def compiled(function: Callable) -> Callable:
    """`function` as one graph, whatever the sizes of its tensors."""
    return torch.compile(function, fullgraph=True, dynamic=True)


def check_compiler(device: torch.device) -> None:
    """Raises RuntimeError when nothing can be compiled for `device`: it says what is missing."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise RuntimeError(
                "compile: torch compiles for GPUs with the package triton, which is not installed: "
                "pip install triton, or leave compile out"
            )
    elif device.type == "cpu":
        check_cpp_compiler()
        name_vector_width()
    else:
        raise RuntimeError(f"compile works on cuda and cpu, not on {device.type}: leave it out")
    limits = torch._dynamo.config
    name = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"
    setattr(limits, name, max(MOST_GRAPHS, getattr(limits, name)))


def check_cpp_compiler() -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise RuntimeError(
            "compile: torch compiles for the CPU with a C++ compiler, and none was found: install "
            "g++ or clang++, or name yours in the environment variable CXX, or leave compile out"
        ) from error


def name_vector_width() -> None:
    """Makes the width of this CPU's vectors part of what torch knows compiled code by.

    Code for wider or narrower ones writes behind its buffers, and torch 2.13 would take it from its
    cache where another kind of CPU left it there: on a shared disk, or under ATEN_CPU_CAPABILITY.
    """
    from torch._inductor import config, cpu_vec_isa

    if config.cpp.simdlen is None and (vectors := cpu_vec_isa.pick_vec_isa()):
        config.cpp.simdlen = vectors.bit_width()
