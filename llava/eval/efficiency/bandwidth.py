"""How near decoding comes to what bounds it: reading the weights and the cache once per token."""

from __future__ import annotations

from statistics import median

import torch

from llava.eval.efficiency.stopwatch import Stopwatch

#: bytes that are copied, on a CPU far above its caches; of a GPU's free memory at most this share
COPIED = {"cuda": 2**31, "cpu": 2**27}
FREE_SHARE = 0.25
TIMES = 7


def weight_bytes(model) -> int:
    """Bytes of the weights that every decoded token reads: decoder layers, last norm and head. Of
    the embeddings it reads one row, of the tower nothing."""
    parts = (*model.model.layers, model.model.norm, model.lm_head)
    return sum(p.nbytes for part in parts for p in part.parameters())


def copy_bandwidth(device: torch.device) -> float | None:
    """Bytes a second that a copy within the memory of `device` reads and writes, both counted.

    The median of several copies of a large tensor. None for devices that are neither a CPU nor
    CUDA.
    """
    if device.type not in COPIED:
        return None
    size = COPIED[device.type]
    if device.type == "cuda":
        size = int(min(size, FREE_SHARE * torch.cuda.mem_get_info(device)[0] / 2))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    watch = Stopwatch(device)
    for _ in range(TIMES + 2):
        with watch.span("copy"):
            target.copy_(source)
    return 2 * size / median(watch.read()["copy"][2:])


def decode_gigabytes_per_second(row: dict) -> float | None:
    """What a step of decoding reads, weights and cache, over the time it takes; None without one.

    row: of a report, see `llava.eval.efficiency.report.summarize`
    """
    decode = row.get("ms", {}).get("decode")
    if decode is None or "weight_bytes" not in row:
        return None
    return (row["weight_bytes"] + row["kv_bytes"]) / decode["median"] / 1e6


def bandwidth_share(row: dict, about: dict) -> float | None:
    """That as a share of the measured bandwidth of a copy, `copy_bandwidth` of `about`."""
    reached, possible = decode_gigabytes_per_second(row), about.get("copy_bandwidth")
    return None if reached is None or not possible else 1e9 * reached / possible
