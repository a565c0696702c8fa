"""What a number depends on besides the code: the model, the machine and the versions."""

from __future__ import annotations

import argparse
import platform

import torch
from transformers import __version__ as transformers_version


def facts_of(model, args: argparse.Namespace) -> dict:
    """The facts of a run that every program of this room can say.

    args: its options, those of `add_clock_arg`, --config, --prompt-length and --visual-token-num
          among them
    """
    return {
        "config": args.config,
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention": model.config._attn_implementation,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "clock": "processor" if args.processor_time else "wall",
        "layers": model.config.num_hidden_layers,
        "visual_token_num": args.visual_token_num,
        "prompt_length": args.prompt_length,
        "torch": torch.__version__,
        "transformers": transformers_version,
    }


def device_name(device: torch.device) -> str:
    """What a GPU is called; of a CPU its kind."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return platform.processor() or platform.machine()
    return device.type


def sentence(about: dict, *what: str) -> str:
    """What was measured, on what and with which versions, as a page says it.

    about: `facts_of` and `copy_bandwidth` in bytes a second, None where it was not measured
    what:  the parts between the machine and the versions, `size` among them
    """
    said = [about["device"], f"{about['threads']} threads", about["dtype"], *what]
    said += [f"{about['clock']} time", f"torch {about['torch']}"]
    said.append(f"transformers {about['transformers']}")
    if about["copy_bandwidth"]:
        said.append(f"copies at {about['copy_bandwidth'] / 1e9:.0f} GB/s")
    return ", ".join(said) + "."


def size(about: dict) -> str:
    """How large the model is, for `sentence`."""
    return f"{about['parameters'] / 1e9:.2f} billion weights (`{about['config']}`)"
