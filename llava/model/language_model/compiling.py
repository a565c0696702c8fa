"""Functions through torch.compile: what has to be there, and one compiled function for each."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import cache, wraps

import torch
from torch import Tensor, nn

from ...errors import UnavailableError

#: numbers of rows, guesses, types and devices make a graph each; torch gives up at 8
MOST_GRAPHS = 64
#: whether `prepare` was called; what it sets torch keeps for every thread by itself
_prepared: ContextVar[bool] = ContextVar("prepared", default=False)
_constants: list[Callable] = []


def constant(function: Callable) -> Callable:
    """Marks a function whose result compiled code may hold as a constant. As
    `torch.compiler.assume_constant_result`, which would load torch's compiler at once: 1.4 s that
    programs which compile nothing do not wait for."""
    _constants.append(function)
    return function


@cache
def compiled(function: Callable) -> Callable:
    """`function` as one graph, whatever the sizes of its tensors; raises UnavailableError where
    torch fails to compile it."""
    from torch._dynamo import exc

    failures: tuple[type[Exception], ...] = (exc.TorchDynamoException,)
    if hasattr(exc, "FailOnRecompileLimitHit"):  # past the limit of `prepare`; it is none of those
        failures += (exc.FailOnRecompileLimitHit,)
    for known in _constants:
        torch.compiler.assume_constant_result(known)
    made = torch.compile(function, fullgraph=True, dynamic=True)

    @wraps(function)
    def call(*args, **keywords):
        prepare()
        try:
            return made(*map(by_itself, args), **keywords)
        except failures as error:
            reason = str(error).strip().partition("\n")[0]
            name = function.__name__
            raise UnavailableError(
                f"compile: torch could not compile {name} ({reason}): leave compile out"
            ) from error

    return call


def by_itself(value):
    """A tensor that is a view of another one as one that is not, without gradients, and a tuple of
    such; else `value`: for views torch compiles a function once more, as it looks at the whole
    tensors behind them."""
    if type(value) is tuple:
        return tuple(map(by_itself, value))
    if isinstance(value, Tensor) and not torch.is_grad_enabled() and value._base is not None:
        return value.detach()
    return value


def may_compile(tower: nn.Module) -> bool:
    """Whether the layers of a vision tower may be compiled now: gradients, and hooks of accelerate
    that bring the weights, are for layers as they are."""
    return not torch.is_grad_enabled() and "_hf_hook" not in vars(tower)


def check_compiler(device: torch.device) -> None:
    """Raises UnavailableError, which says what is missing, where nothing compiles for `device`."""
    if device.type == "cuda":
        check_triton()
    elif device.type == "cpu":
        check_cpp_compiler()
    else:
        raise UnavailableError(f"compile works on cuda and cpu, not on {device.type}: leave it out")


def check_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise UnavailableError(
            "compile: torch compiles for GPUs with the package triton, which is not installed: "
            "pip install triton, or leave compile out"
        )
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise UnavailableError(
            "compile: triton starts its kernels with code that it compiles in C, and no compiler "
            "was found: install gcc or clang, or name yours in the environment variable CC, or "
            "leave compile out"
        )


def check_cpp_compiler() -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise UnavailableError(
            "compile: torch compiles for the CPU with a C++ compiler, and none was found: install "
            "g++ or clang++, or name yours in the environment variable CXX, or leave compile out"
        ) from error


def prepare() -> None:
    """Sets in this thread what compiling needs of torch: it may be another one than the model was
    loaded in, as in a server."""
    if _prepared.get():
        return
    limits = torch._dynamo.config
    name = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"
    setattr(limits, name, max(MOST_GRAPHS, getattr(limits, name)))
    with suppress(UnavailableError):  # GPUs do without
        check_cpp_compiler()
        name_vector_width()
    _prepared.set(True)


def name_vector_width() -> None:
    """Makes the width of this CPU's vectors part of what torch knows compiled code by.

    Code for wider or narrower ones writes behind its buffers, and torch 2.13 would take it from its
    cache where another kind of CPU left it there: on a shared disk, or under ATEN_CPU_CAPABILITY.
    """
    from torch._inductor import config, cpu_vec_isa

    if config.cpp.simdlen is None and (vectors := cpu_vec_isa.pick_vec_isa()):
        config.cpp.simdlen = vectors.bit_width()
