"""Reading tensors from files, and the folders they are in; safe with files of any origin.

Nothing here runs code from a file: safetensors hold none, and `.bin` and `.pt` files are read with
`weights_only=True`.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import wraps

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

#: share of a file that may stay mapped in memory beside the tensors already copied
MAPPED_SHARE = 0.05
#: where downloads from the hub are looked for and put; None: the hub's own place
CACHE_DIR: ContextVar[str | None] = ContextVar("cache_dir", default=None)


def uses_cache_dir(load: Callable) -> Callable:
    """Decorates a function whose keyword `cache_dir` says where everything that it looks up on the
    hub is: models, towers, trained parts."""

    @wraps(load)
    def inside(*args, **keywords):
        token = CACHE_DIR.set(keywords.get("cache_dir"))
        try:
            return load(*args, **keywords)
        finally:
            CACHE_DIR.reset(token)

    return inside


def local_folder(name: str, use_safetensors: bool | None = None) -> str:
    """The folder `name`, or the download of the hub repository called `name`.

    use_safetensors: False downloads the `.bin` files in place of safetensors
    """
    if os.path.isdir(name):
        return name
    if os.path.isabs(name) or name.startswith(".") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(f"checkpoint folder {name!r} does not exist")
    from huggingface_hub import snapshot_download

    def download(*suffixes: str) -> str:
        patterns = [f"*{suffix}" for suffix in (".json", ".model", ".txt", *suffixes)]
        return snapshot_download(name, allow_patterns=patterns, cache_dir=CACHE_DIR.get())

    try:
        folder = None if use_safetensors is False else download(".safetensors")
        if folder is None or not any(f.endswith(".safetensors") for f in os.listdir(folder)):
            folder = download(".bin", ".pt")
    except Exception as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor a hub repository that can be reached: {error}"
        ) from error
    return folder


def tensors_in(path: str, skip: Iterable[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one file; a tensor is only good until the next one is asked for."""
    skip = set(skip)
    try:
        read = _safetensors_in if path.endswith(".safetensors") else _bin_in
        yield from read(path, skip)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it holds something other than tensors, which could run code "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged or not a weight file: {error}") from error


def _safetensors_in(path: str, skip: set[str]) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name not in skip]
    for name in names:
        # Opened anew for each tensor: pages of a mapping count as memory until it is closed.
        with safe_open(path, "pt") as file:
            yield name, file.get_tensor(name)


def _bin_in(path: str, skip: set[str]) -> Iterator[tuple[str, Tensor]]:
    mmap = zipfile.is_zipfile(path)  # files of torch < 1.6 are no archives and cannot be mapped
    limit = max(os.path.getsize(path) * MAPPED_SHARE, 1)
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    names, mapped = [name for name in tensors if name not in skip], 0
    for name in names:
        if mapped > limit:
            tensors, mapped = None, 0
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        for full_name, tensor in _flat(name, tensors[name], path):
            mapped += tensor.nbytes if mmap else 0
            yield full_name, tensor
            del tensor


def _flat(name: str, value, path: str) -> Iterator[tuple[str, Tensor]]:
    """A tensor as it is; the tensors of a nested state dict as NAME.INNER."""
    if isinstance(value, Tensor):
        yield name, value
        return
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name!r} is a {type(value).__name__}, expected a tensor")
    for key, inner in value.items():
        yield from _flat(f"{name}.{key}", inner, path)
