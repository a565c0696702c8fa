"""What decides the answers of a run: two runs continue each other only where all of it agrees."""

from __future__ import annotations

import os

import llava
from llava.config_file import earlier_words
from llava.eval.files.fingerprints import fingerprint
from llava.eval.files.records import read_json

#: options that say how fast answers come, where they go, or which questions are asked. Every other
#: one may change an answer, also one that is added to a program tomorrow
HARMLESS = frozenset(
    "model_path model_name question_file image_folder answers_file data_dir out overwrite "
    "num_chunks chunk_idx limit batch_size workers reuse device skip_bad follow answer_prompter "
    "methods tokens tasks pruning_method visual_token_num pruning_arg pruner "
    "timed_prompts published page highlight compile "
    "engine_url allow_engine engine_key_file engine_requests".split()
)
#: options that other records cover, in a more exact form
COVERED = frozenset(("model_base", "vision_tower", "dtype"))
#: files of a checkpoint whose values count, besides its weights
CONFIGS = ("config.json", "generation_config.json", "preprocessor_config.json")
CONFIGS += ("processor_config.json",)
TOKENIZER = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
TOKENIZER += ("tokenizer_config.json", "special_tokens_map.json")
#: values of a config that say where it comes from, not what the model does
PROVENANCE = ("_name_or_path", "transformers_version")


def settings_of(args, pruner) -> dict:
    """Returns what must agree for two runs to continue each other's answers (JSON values)."""
    options = {
        name: value
        for name, value in vars(args).items()
        if name not in HARMLESS and name not in COVERED and _is_plain(value)
    }
    parts = [checkpoint_settings(folder) for folder in pruner.part_folders(args.model_path)]
    base, tower = getattr(args, "model_base", None), _tower_folder(args)
    return options | {
        "version": llava.__version__,
        "model": args.model_name,
        "model_base": base,
        "vision_tower": getattr(args, "vision_tower", None),
        "dtype": _dtype(args),
        "pruner": repr(pruner),
        **checkpoint_settings(args.model_path),
        **({"base": checkpoint_settings(base)} if base else {}),
        **({"tower": checkpoint_settings(tower)} if tower else {}),
        **({"trained_parts": parts} if parts else {}),
    }


def checkpoint_settings(folder: str) -> dict:
    """The fingerprint of the weights in a folder, and the values of its configuration files."""
    found: dict = {"weights": fingerprint(folder)}
    if not os.path.isdir(folder):
        return found
    for name in CONFIGS:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            found[name.removesuffix(".json")] = _without_provenance(read_json(path))
    if any(os.path.exists(os.path.join(folder, name)) for name in TOKENIZER):
        found["tokenizer"] = fingerprint(folder, TOKENIZER)
    return found


def _without_provenance(values):
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if key not in PROVENANCE}


def _is_plain(value) -> bool:
    """Whether a value is one that JSON can hold, and that reads the same in the next run."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _config(folder: str | None) -> dict:
    path = os.path.join(folder or "", "config.json")
    values = read_json(path) if folder and os.path.isfile(path) else {}
    return earlier_words(values) if isinstance(values, dict) else {}


def _tower_folder(args) -> str | None:
    """Where the tower lies that a run sees with, unless that is on the hub."""
    from llava.model.multimodal_encoder.builder import resolve_tower_path

    places = (args.model_path, getattr(args, "model_base", None))
    name = getattr(args, "vision_tower", None) or _config(places[0]).get("mm_vision_tower")
    if not isinstance(name, str):
        return None
    found = (resolve_tower_path(name, place) for place in places if place)
    return next((folder for folder in found if os.path.isdir(folder)), None)


def _dtype(args) -> str | None:
    """The number format of the run: the one asked for, or what the device gets by default."""
    from llava.model.placement import choose_device, choose_dtype
    from llava.model_args import DTYPES

    asked = getattr(args, "dtype", None)
    quantized = bool(getattr(args, "load_8bit", None) or getattr(args, "load_4bit", None))
    values = _config(args.model_path) or _config(getattr(args, "model_base", None))
    if asked is None and not values:
        return None  # not known before the checkpoint is here
    device = choose_device(getattr(args, "device", None))
    return str(choose_dtype(DTYPES.get(asked), values, device, quantized)).removeprefix("torch.")


def differences(before: dict, now: dict, name: str = "") -> list[str]:
    """What differs between two sets of settings, in words; those inside others by `outer.inner`."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{name}{key}.")
        elif old != new or isinstance(old, bool) != isinstance(new, bool):
            found.append(f"{name}{key} was {_short(old)} and is now {_short(new)}")
    return found


def _short(value, most: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
