"""Which device and number format a model runs in, and moving it there."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import compute_module_sizes, get_balanced_memory
from torch import nn

from ..checkpoint_kind import OTHER_FAMILIES, family_in
from ..linear import cpu_knows

Model = TypeVar("Model", bound=nn.Module)

#: strategies that share a model out over several GPUs
SHARING = ("auto", "balanced", "balanced_low_0", "sequential")
#: share of a GPU's free memory that weights may fill, the rest is for activations and cache
WEIGHT_SHARE = 0.85


def choose_device(device: str | torch.device | None) -> torch.device:
    """`device`, or the best there is: cuda, then mps, then cpu. ValueError when it is not there."""
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}, choose cuda, cuda:1, mps or cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but no CUDA device is available")
    if device.type == "cuda" and device.index is not None:
        if device.index >= (count := torch.cuda.device_count()):
            raise ValueError(
                f"device {str(device)!r} was asked for, but the last of {count} CUDA devices is "
                f"cuda:{count - 1}"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but MPS is not available")
    return device


def single_device(device_map, device: str | torch.device | None) -> torch.device | None:
    """The one device a `device_map` argument comes down to; None when it names several."""
    if device_map is None or device_map in SHARING:
        return choose_device(device)
    if isinstance(device_map, dict):
        targets = set(device_map.values())
        return choose_device(_named(targets.pop())) if len(targets) == 1 else None
    return choose_device(_named(device_map))


def _named(device):
    return f"cuda:{device}" if isinstance(device, int) else device


def choose_dtype(
    dtype: torch.dtype | str | None, config: dict, device: torch.device, quantized: bool = False
) -> torch.dtype:
    """`dtype`, or the default: float16 on a GPU or of a quantised model, or for families whose
    values leave its range bfloat16 where the GPU has that (on a CPU what that is fast at); else on
    the CPU the dtype in the config values, with float32 in place of a half type that it is slow at.
    """
    saved = saved_dtype(config)
    if dtype == "auto":
        return saved
    if isinstance(dtype, str):
        named = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(named, torch.dtype) or not named.is_floating_point:
            raise ValueError(f"unknown torch_dtype {dtype!r}, choose float32, float16 or bfloat16")
        return named
    if dtype is not None:
        return dtype
    if quantized or device.type != "cpu":
        wide = family_in(config) in OTHER_FAMILIES
        return fast_dtype(device) if wide else torch.float16
    slow = saved == torch.float16 or saved == torch.bfloat16 and not cpu_multiplies_bfloat16()
    return torch.float32 if slow else saved


def saved_dtype(config: dict) -> torch.dtype:
    """What the config values say that the weights are saved in; float32 when they say nothing."""
    return getattr(torch, str(config.get("torch_dtype", "float32")).removeprefix("torch."))


def dtype_note(chosen: torch.dtype, config: dict, device: torch.device) -> str | None:
    """A sentence on a default that follows from the kind of CPU; None where it does not."""
    saved = saved_dtype(config)
    if device.type != "cpu" or saved not in (torch.float16, torch.bfloat16):
        return None
    names = {name: str(name).removeprefix("torch.") for name in (chosen, saved)}
    if chosen == saved:
        return f"Running in {names[chosen]}, as saved: this CPU multiplies it natively."
    return (
        f"Running in {names[chosen]}: this CPU is slow at {names[saved]}, which the weights are "
        f"saved in (dtype {names[saved]} uses it all the same)."
    )


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 matrices, and they are in use.

    Without them such products are many times slower than those of float32. The instructions are
    AVX512_BF16 or AMX on x86, BF16 on Arm. oneDNN, which does the products, may be kept from using
    them by its variable ONEDNN_MAX_CPU_ISA.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    # oneDNN also counts CPUs with plain AVX-512, where it imitates the instructions.
    return cpu_knows("avx512_bf16", "amx_bf16", "bf16")


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype for weights that were saved in none, such as random ones: bfloat16 where the device
    multiplies it natively, else float32 on a CPU and float16 on a GPU."""
    device = torch.device(device)
    if device.type == "cpu":
        return torch.bfloat16 if cpu_multiplies_bfloat16() else torch.float32
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if native else torch.float16


def place(
    model: Model, device_map, device: torch.device, packed: dict[str, Any] | None = None
) -> Model:
    """The model on its device, or shared out over several as `device_map` says.

    packed: types, as accelerate names them, of weights that are packed as they move there
    """
    if not may_share(device_map, device):
        return model.to(device)
    if isinstance(device_map, dict):
        return dispatch_model(model, {name: _named(where) for name, where in device_map.items()})
    packed = packed or {}
    if device_map == "auto" and _fits(model, device, packed):
        return model.to(device)
    return _share(model, device_map, packed)


def may_share(device_map, device: torch.device) -> bool:
    """Whether the model may end up on more than one device."""
    if isinstance(device_map, dict):
        return single_device(device_map, device) is None
    several = device == torch.device("cuda") and torch.cuda.device_count() > 1
    return several and device_map in SHARING


def _fits(model: nn.Module, device: torch.device, packed: dict[str, Any]) -> bool:
    free, _ = torch.cuda.mem_get_info(device)
    return compute_module_sizes(model, special_dtypes=packed)[""] < WEIGHT_SHARE * free


def _share(model: Model, strategy: str, packed: dict[str, Any]) -> Model:
    whole = model._no_split_modules
    memory = None
    if strategy != "sequential":
        low = strategy == "balanced_low_0"
        memory = get_balanced_memory(
            model, no_split_module_classes=whole, special_dtypes=packed, low_zero=low
        )
    device_map = infer_auto_device_map(
        model, max_memory=memory, no_split_module_classes=whole, special_dtypes=packed
    )
    return dispatch_model(model, device_map)
