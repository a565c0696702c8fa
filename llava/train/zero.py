"""DeepSpeed: what the pinned transformers leaves undone between its Trainer and ZeRO."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.integrations import deepspeed as hf_deepspeed

logger = logging.getLogger(__name__)

#: schedules of DeepSpeed that are one of the Trainer's
SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear"}


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


def check_deepspeed(training_args) -> None:
    """Raises ValueError for flags that a DeepSpeed file with an optimizer or a schedule of its own
    leaves unread, and warns of --lr_scheduler_type, before a model is loaded."""
    if not training_args.deepspeed:
        return
    config, file = training_args.hf_deepspeed_config.config, training_args.deepspeed
    flags = {
        "mm_projector_lr": training_args.mm_projector_lr is not None,
        "mm_vision_tower_lr": training_args.mm_vision_tower_lr is not None,
        "matrix_optim": training_args.matrix_optim != "same",
    }
    asked = next((name for name, given in flags.items() if given), None)
    own = next((name for name in ("optimizer", "scheduler") if name in config), None)
    if asked and own:
        raise ValueError(
            f"--{asked} {getattr(training_args, asked)}: the {own} of {file} has one learning rate "
            'for all that is trained; take "optimizer" and "scheduler" out of a copy of that file, '
            "or leave the flag out"
        )
    kind = config.get("scheduler", {}).get("type")
    if kind is not None and SCHEDULES.get(kind) != training_args.lr_scheduler_type:
        logger.warning(
            "the schedule of %s, %s, takes the place of --lr_scheduler_type %s",
            *(file, kind, training_args.lr_scheduler_type.value),
        )


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
