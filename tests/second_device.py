"""Devices that are not there: tensors that say they live on another device while the CPU computes.

They show what GPUs would suffer from, without one: operations that mix devices are refused as torch
refuses them; what is copied from device to device is counted, and how often the host has to wait
until a device has computed all that it was asked for, what it brings there, and how many kernels it
starts.

    place(model.model.layers[3], SECOND)
    with devices() as log:
        model.generate(...)
    log.copies          # (from, to, shape) of every tensor that was brought elsewhere
    log.waits           # the operation and the line of our code, for every wait
    log.uploads         # the same for what comes from the memory of the host
    log.kernels         # operation -> how often a device was asked for it; views cost it nothing

Limits: no inference mode (use no_grad), no gradients, no torch.compile.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from llava.eval.efficiency.launches import FREE
from tests.paths import ROOT

# The kind of device that torch keeps for others. A name and hooks of its own would make torch take
# it for the accelerator of this process, also in tests that have nothing to do with it.
KNOWS_DEVICES = hasattr(backend_registration, "_DummyDeviceGuard")
if KNOWS_DEVICES and torch._C._get_privateuse1_backend_name() == "privateuseone":
    guard = backend_registration._DummyDeviceGuard()
    torch._C._acc.register_python_privateuseone_device_guard(guard)
NAME = torch._C._get_privateuse1_backend_name()
SECOND, THIRD = torch.device(NAME, 0), torch.device(NAME, 1)
#: indices may stay on the host, as torch allows
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
#: index tensors of these types say which elements, and so how many
MASKS = (torch.bool, torch.uint8)
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount")
WAITS += ("_unique2", "unique_dim", "unique_consecutive")


@dataclass
class Log:
    copies: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)


class Elsewhere(Tensor):
    """`inner`, a tensor of the CPU, as if it lived on `device`."""

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device):
        self = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
        )
        self.inner = inner
        return self

    def __repr__(self, **_):
        return f"Elsewhere({self.inner!r}, {self.device})"

    def tolist(self):
        note("waits", "tolist")
        return self.inner.tolist()

    def numpy(self, *_, **__):
        raise TypeError(f"can't convert a tensor of {self.device} to numpy: copy it to the host")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


_logs: list[Log] = []


def note(kind: str, operation: str) -> None:
    """Adds an operation, and the line of our code that asked for it, to a list of all logs."""
    lines = [f for f in traceback.extract_stack() if str(ROOT / "llava") in f.filename]
    where = f" at {Path(lines[-1].filename).name}: {lines[-1].line}" if lines else ""
    for log in _logs:
        getattr(log, kind).append(operation + where)


def waits_for_device(name: str, overload: str, args: tuple, target) -> bool:
    """Whether an operation on tensors of a device needs their values on the host: to know a number,
    the size of its result, or because that goes there."""
    if name in INDEXING:
        return any(index is not None and index.dtype in MASKS for index in args[1])
    if name == "copy_":
        return args[0].device.type == "cpu" and args[1].device.type == NAME
    if name == "repeat_interleave":
        return overload != "self_int"
    return name in WAITS or (target is not None and torch.device(target).type == "cpu")


def _run(func, args, kwargs):
    name = func._schema.name.split("::")[1]
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, Elsewhere)]
    # Numbers wrapped as tensors of the host may be used anywhere.
    used = {x.device for x in tensors if isinstance(x, Elsewhere) or x.dim()}
    target = kwargs.get("device")
    if ours and waits_for_device(name, func._overloadname, args, target):
        note("waits", name)
    if name in ("copy_", "_to_copy"):
        source, there = args[1] if name == "copy_" else args[0], target or args[0].device
        if source.device != torch.device(there):
            for log in _logs:
                log.copies.append((str(source.device), str(there), tuple(source.shape)))
            if source.device.type == "cpu":
                note("uploads", name)
    elif name in INDEXING and isinstance(args[0], Elsewhere):
        if any(x is not None and x.device.type == "cpu" for x in args[1]):
            note("uploads", name)
        used = used - {torch.device("cpu")}
    if len(used) > 1 and name not in ("copy_", "_to_copy"):
        raise RuntimeError(f"{name}: tensors on different devices, {sorted(map(str, used))}")
    where = args[0].device if name == "copy_" else None if target is None else torch.device(target)
    if where is None:
        where = ours[0].device if ours else torch.device("cpu")
    if where.type == NAME and name not in FREE:
        for log in _logs:
            log.kernels[name] += 1
    args, kwargs = pytree.tree_map(
        lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs)
    )
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)
    out = func(*args, **kwargs)
    if where.type != NAME:
        return out
    known = {id(x.inner): x for x in ours}  # operations in place return what they were given

    def wrap(x):
        if not isinstance(x, Tensor) or isinstance(x, Elsewhere):
            return x
        return known[id(x)] if id(x) in known else Elsewhere(x, where)

    return pytree.tree_map(wrap, out)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def _registered():
    """torch looks for a module of the device's name, for the time of the block it finds one."""
    if not KNOWS_DEVICES:
        pytest.skip(f"torch {torch.__version__} knows no devices that are made in Python")
    if hasattr(torch, NAME):
        yield
        return
    setattr(torch, NAME, backend_registration._DummyBackendModule())
    sys.modules[f"torch.{NAME}"] = getattr(torch, NAME)
    try:
        yield
    finally:
        delattr(torch, NAME)
        del sys.modules[f"torch.{NAME}"]


@contextlib.contextmanager
def devices():
    """Inside, `device=` may name a pretended device; gives the log of copies."""
    if not KNOWS_DEVICES:
        pytest.skip(f"torch {torch.__version__} knows no devices that are made in Python")
    plain, log = torch.tensor, Log()

    def tensor(data, *args, device=None, **kwargs):
        made = plain(data, *args, **kwargs)
        return made if device is None else made.to(device)

    torch.tensor = tensor
    _logs.append(log)
    try:
        with _registered(), _Mode():
            yield log
    finally:
        torch.tensor = plain
        _logs.remove(log)


def place(module: nn.Module, device: torch.device) -> None:
    """Puts the weights of a module on a pretended device."""
    with _registered():
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    part._parameters[name] = nn.Parameter(Elsewhere(value.data, device), False)
            for name, value in part._buffers.items():
                if value is not None:
                    part._buffers[name] = Elsewhere(value, device)


class No64(TorchDispatchMode):
    """Refuses float64 tensors, as MPS does; but not what `Tensor.quantile` does in itself, which
    from torch 2.14 on takes some on a CPU."""

    def __enter__(self):
        quantile = Tensor.quantile

        def unwatched(*args, **kwargs):
            with _disable_current_modes():
                return quantile(*args, **kwargs)

        self.quantile, Tensor.quantile = quantile, unwatched
        return super().__enter__()

    def __exit__(self, *raised):
        Tensor.quantile = self.quantile
        return super().__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves((args, kwargs, out)):
            if isinstance(x, Tensor) and x.dtype in (torch.float64, torch.complex128):
                raise TypeError(f"{func._schema.name}: no float64 on this device")
        return out
