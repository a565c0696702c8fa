"""What an answer cost: time, new tokens, operations, memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from llava.eval.files import costs
from llava.pruning import PruningTrace
from llava.pruning.cost import decode_flops, prefill_flops


def new_tokens(output: Tensor, ends: set[int]) -> list[int]:
    """Tokens of every answer (B, n), the one that ends it included."""
    counts = []
    for row in output.tolist():
        stops = [place for place, token in enumerate(row) if token in ends]
        counts.append(stops[0] + 1 if stops else len(row))
    return counts


def end_tokens(model) -> set[int]:
    """Ids of the tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())


def operations(trace: PruningTrace, row: int, count: int, unpruned: int) -> dict:
    """Operations of the decoder for one prompt of a traced batch, and what an unpruned prompt of
    the same words would have taken.

    count: tokens of its answer; unpruned: tokens of its images without a method
    """
    tokens = [int(layer[row]) for layer in trace.prompt_tokens]
    text = tokens[0] - int(trace.visual_tokens[0][row])
    whole = [text + unpruned] * len(tokens)
    held = [int(layer[row]) for layer in trace.kv_lengths] or tokens
    return {
        costs.PREFILL: prefill_flops(trace.shape, tokens),
        costs.PREFILL_UNPRUNED: prefill_flops(trace.shape, whole),
        costs.DECODE: decode_flops(trace.shape, held, count),
        costs.DECODE_UNPRUNED: decode_flops(trace.shape, whole, count),
    }


class Meter:
    """Time and memory of the calls it makes.

    memory: also the peak of a GPU's memory
    """

    def __init__(self, device: torch.device, memory: bool = False):
        if memory and device.type != "cuda":
            raise ValueError(
                f"the memory of single answers can be told on a GPU, not on {device.type}: "
                "python -m llava.eval.efficiency measures it elsewhere"
            )
        self.device, self.memory = device, memory

    def __call__(self, work: Callable[[], Tensor], batch: int) -> tuple[Tensor, dict]:
        """(what `work` returns, metadata of each of the `batch` answers)."""
        if self.memory:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        output = work().cpu()  # waits for the device
        seconds = time.perf_counter() - start
        found = {costs.MILLISECONDS: round(1000 * seconds / batch, 3)}
        if self.memory:
            peak = torch.cuda.max_memory_allocated(self.device)
            found[costs.PEAK] = round(peak / 2**20, 1)
        return output, found
