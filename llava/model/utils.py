"""Upgrading the config of checkpoints from before model types had names of their own."""

import json
import os

from ..checkpoint_kind import is_llava, model_type_of
from ..config_file import read_json


def auto_upgrade(folder: str, confirm: bool = True) -> bool:
    """Marks a plain Llama config of an early LLaVA checkpoint as LLaVA's, in place.

    confirm: ask on the terminal first; SystemExit when the answer is no. Returns whether the file
    was changed. Only needed by other programs: our loader reads such folders as they are.
    """
    path = os.path.join(folder, "config.json")
    config = read_json(path)
    llava = is_llava(config) or "llava" in os.path.basename(os.path.abspath(folder)).lower()
    if not llava or "llava" in model_type_of(config):
        return False
    if config.get("model_type") != "llama":
        raise ValueError(f"{path}: model_type is {config.get('model_type')!r}, expected 'llama'")
    if confirm:
        answer = input(f"{path} is from an early version. Upgrade it in place? [Y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            raise SystemExit("checkpoint left as it is")
    config["model_type"] = "llava"
    config["architectures"] = ["LlavaLlamaForCausalLM"]
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file, indent=2)
    return True
