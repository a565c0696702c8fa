"""Tokenizers that later versions of `tokenizers` saved, for the installed one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from ..config_file import read_json

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
#: what is said where a tokenizer cannot be read
OTHER_FILES = "if a later version saved tokenizer.json, put {} of the original model beside it"


def in_earlier_words(path: str) -> dict | None:
    """What tokenizer.json at `path` says, with merges as "a b", which were ["a", "b"] before; None
    where it has no such merges, or some that "a b" cannot say."""
    values = read_json(path) if os.path.isfile(path) else {}
    model = values.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        return None
    merges = model["merges"]
    for pair in merges:  # a list of strings is in earlier words already
        if not isinstance(pair, list) or len(pair) != 2:
            return None
        if not all(isinstance(part, str) and " " not in part for part in pair):
            return None
    return {**values, "model": {**model, "merges": [" ".join(pair) for pair in merges]}}


@contextmanager
def earlier_files(folder: str) -> Iterator[str | None]:
    """A folder with the tokenizer in `folder` as the installed version reads it, for the time of
    the block; None where there is nothing to translate."""
    values = in_earlier_words(os.path.join(folder, TOKENIZER))
    if values is None:
        yield None
        return
    with TemporaryDirectory() as copy:
        with open(os.path.join(copy, TOKENIZER), "w", encoding="utf-8") as file:
            json.dump(values, file)
        for name in ("added_tokens.json", "special_tokens_map.json"):
            if os.path.isfile(path := os.path.join(folder, name)):
                shutil.copyfile(path, os.path.join(copy, name))
        path = os.path.join(folder, SETTINGS)
        settings = read_json(path) if os.path.isfile(path) else {}
        if isinstance(extra := settings.pop("extra_special_tokens", None), list):
            settings.setdefault("additional_special_tokens", extra)
        with open(os.path.join(copy, SETTINGS), "w", encoding="utf-8") as file:
            json.dump(settings, file)
        yield copy
