"""FSDP: what the pinned transformers leaves unread of the file that --fsdp_config names."""

from __future__ import annotations

import os

from accelerate.utils import DistributedType
from transformers.utils import strtobool

#: the keys that are followed; transformers reads the first four
KEYS = (
    "min_num_params transformer_layer_cls_to_wrap sync_module_states use_orig_params "
    "limit_all_gathers backward_prefetch forward_prefetch"
).split()
SWITCHES = ("limit_all_gathers", "forward_prefetch", "activation_checkpointing", "use_orig_params")
#: keys that transformers itself adds, with values that ask for nothing
ADDED = ("xla", "xla_fsdp_grad_ckpt")
PREFETCHES = ("backward_pre", "backward_post", "no_prefetch")


def check_fsdp(training_args) -> None:
    """Raises ValueError for keys of --fsdp_config that cannot be followed."""
    if not training_args.fsdp:
        return
    for key, value in training_args.fsdp_config.items():
        if key in SWITCHES and str(value).lower() not in ("true", "false"):
            raise ValueError(f"--fsdp_config: {key} is {value!r}, choose true or false")
        if key == "use_orig_params" and not isinstance(value, str):
            raise ValueError(
                f'--fsdp_config: transformers reads {key} as a text: write "{str(value).lower()}"'
            )
        if key in KEYS or (key in ADDED and not value):
            continue
        if key == "activation_checkpointing":
            if not is_on(value):
                continue
            raise ValueError(
                "--fsdp_config: activation_checkpointing cannot be set, --gradient_checkpointing "
                "True saves the same memory"
            )
        raise ValueError(f"--fsdp_config: there is no key {key}, choose from {', '.join(KEYS)}")
    prefetch = training_args.fsdp_config.get("backward_prefetch", PREFETCHES[-1])
    if str(prefetch).lower() not in PREFETCHES:
        raise ValueError(
            f"--fsdp_config: backward_prefetch {prefetch!r} is unknown, choose from "
            f"{', '.join(PREFETCHES)}"
        )


def check_fsdp_devices(training_args) -> None:
    """Raises ValueError where accelerate would leave --fsdp out without a word, and every process
    hold the whole model."""
    kind = training_args.distributed_state.distributed_type
    if training_args.fsdp and kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ValueError(
            f"--fsdp {' '.join(training_args.fsdp)} splits a model between GPUs, one for each "
            "process of a launcher (torchrun --nproc_per_node 8 -m llava.train.train ...): leave "
            "it out on the CPU, and for one process"
        )


def is_on(value) -> bool:
    """What a switch in such a file says, which may be a text."""
    return bool(strtobool(str(value)))


def announce_prefetch(training_args) -> None:
    """Says to accelerate what transformers reads under names that no file can have; called before
    accelerate makes its settings."""
    config = training_args.fsdp_config
    if "backward_prefetch" in config:
        os.environ["FSDP_BACKWARD_PREFETCH"] = str(config["backward_prefetch"]).upper()
    if "forward_prefetch" in config:
        os.environ["FSDP_FORWARD_PREFETCH"] = str(is_on(config["forward_prefetch"])).lower()


def settle_fsdp(plugin, training_args) -> None:
    """Brings the rest into accelerate's settings."""
    if "limit_all_gathers" in training_args.fsdp_config:
        plugin.limit_all_gathers = is_on(training_args.fsdp_config["limit_all_gathers"])
