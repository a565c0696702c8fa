"""DeepSpeed: what the pinned transformers leaves undone between its Trainer and ZeRO."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.integrations import deepspeed as hf_deepspeed


def join_processes(training_args) -> None:
    """Readies DeepSpeed's communication before a model is loaded in pieces.

    Raises ValueError when no launcher has started this process.
    """
    if not training_args.deepspeed:
        return
    if "RANK" not in os.environ:
        raise ValueError(
            f"--deepspeed {training_args.deepspeed} needs a launcher, also for one process: "
            "`deepspeed llava/train/train.py ...` or `torchrun --nproc_per_node 1 -m "
            "llava.train.train ...`"
        )
    from deepspeed import comm

    if not comm.is_initialized():
        # The Trainer has made a group already when it runs on the CPU: DeepSpeed takes that one.
        comm.init_distributed(auto_mpi_discovery=False)


def settle_sizes(training_args, hidden_size: int) -> None:
    """Fills the sizes that a DeepSpeed file leaves to the width of the model ("auto").

    The Trainer would fill them itself, but with a fraction for most widths, 4096 among them, which
    DeepSpeed refuses; and only for a model that has a `config`.
    """
    if not training_args.deepspeed:
        return
    settings, area = training_args.hf_deepspeed_config, hidden_size * hidden_size
    settings.fill_only("zero_optimization.reduce_bucket_size", area)
    if settings.is_zero3():
        settings.fill_only("zero_optimization.stage3_prefetch_bucket_size", int(0.9 * area))
        settings.fill_only("zero_optimization.stage3_param_persistence_threshold", 10 * hidden_size)


@contextmanager
def kept_whole(training_args) -> Iterator[None]:
    """Models loaded in this block are whole in every process, under ZeRO-3 as well.

    For a frozen model that is not part of what DeepSpeed is given: nobody would gather its pieces.
    """
    if not training_args.deepspeed:
        yield
        return
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed.set_hf_deepspeed_config(training_args.hf_deepspeed_config)


def register_parameter(module: nn.Module, parameter: nn.Parameter) -> None:
    """Has ZeRO-3 gather `parameter` for the forward pass of `module`, which uses it directly."""
    from deepspeed import zero

    zero.register_external_parameter(module, parameter)


def refuse_fsdp(part: str) -> None:
    raise ValueError(f"--fsdp trains whole models only, not {part}: use --deepspeed, or neither")
