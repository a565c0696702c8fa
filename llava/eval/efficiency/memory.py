"""Peak memory of a piece of work, on top of what is held before it."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what proc(5) says resets VmHWM


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `work` needs at most beyond what is allocated when it starts.

    On a GPU from torch's allocator, on Linux from the resident set of the process; elsewhere None.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if not CLEAR.exists():
        return None
    _return_free_pages()
    CLEAR.write_text(RESET_PEAK)
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _return_free_pages() -> None:
    """Pages the allocator keeps for later would hide what the work takes of them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    kilobytes = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.M)[1]
    return int(kilobytes) * 1024
