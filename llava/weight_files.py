"""Reading tensors from files, and the folders they are in; safe with files of any origin.

Nothing here runs code from a file: safetensors hold none, and `.bin` and `.pt` files are read with
`weights_only=True`. An index only names files of its own folder, no tensor claims more memory than
its file has, and whatever else is wrong with a file is a ValueError that names it.
"""

from __future__ import annotations

import os
import pickle
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import reduce, wraps

import torch
from safetensors import safe_open
from torch import Tensor

from .config_file import first_line, read_json, shown

#: (index file, single file), in order of preference
WEIGHT_FILES = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
SUFFIXES = (".safetensors", ".bin")
#: what was trained beside an adapter, in this format whatever that of the adapter is
BESIDE_ADAPTER = "non_lora_trainables.bin"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
#: endings of the names that other programs give to weights of a few bits in place of ".weight"
PACKED_SUFFIXES = (".qweight", ".weight_packed")
NO_PACKED = (
    "quantised checkpoints are not supported, load the original (with load_8bit or load_4bit)"
)
#: as safetensors call them
SAFETENSORS_FLOATS = dict(zip(("F32", "F16", "BF16", "F64"), FLOATS, strict=True))
#: share of a file that may stay mapped in memory beside the tensors already copied
MAPPED_SHARE = 0.05
#: dictionaries in dictionaries that a `.bin` may hold, and tensors in one file
MAX_DEPTH = 3
MAX_TENSORS = 100_000
#: names in a folder that an error gives
NAMES_SHOWN = 5
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
    check_checkpoint_name(name)
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download

    def download(*suffixes: str) -> str:
        patterns = [f"*{suffix}" for suffix in (".json", ".model", ".txt", *suffixes)]
        patterns.append(BESIDE_ADAPTER)
        return snapshot_download(name, allow_patterns=patterns, cache_dir=CACHE_DIR.get())

    try:
        folder = None if use_safetensors is False else download(".safetensors")
        if folder is None or not any(f.endswith(".safetensors") for f in os.listdir(folder)):
            folder = download(".bin", ".pt")
    except Exception as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder{_beside(name)} nor a hub repository that can be "
            f"reached: {error}"
        ) from error
    return folder


def check_checkpoint_name(name: str) -> None:
    """Raises an OSError unless `name` is a folder or might be a hub repository."""
    if os.path.isfile(name):
        raise NotADirectoryError(f"{name} is a file: name the folder of the checkpoint")
    if not os.path.isdir(name) and not is_repository(name):
        raise FileNotFoundError(f"checkpoint folder {name!r} does not exist")


def _beside(name: str) -> str:
    """What is said of a name whose first part is a folder here: what lies there."""
    first = name.partition("/")[0]
    if first == name or not os.path.isdir(first):
        return ""
    found = sorted(os.listdir(first))[:NAMES_SHOWN]
    return f" ({first} is one, and holds {', '.join(found) or 'nothing'})"


def is_repository(name: str) -> bool:
    """Whether `name` can be that of a hub repository."""
    local = os.path.isabs(name) or name.startswith(".")
    return not local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def hub_file(name: str, file: str) -> str | None:
    """A single file of the hub repository `name`; None when it cannot be had."""
    if not is_repository(name):
        return None
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(name, file, cache_dir=CACHE_DIR.get())
    except Exception:  # the download of the whole says what is wrong
        return None


def tensor_file(folder: str, stem: str) -> str | None:
    """`stem`.safetensors or `stem`.bin in `folder`; None when neither is there."""
    paths = (os.path.join(folder, stem + suffix) for suffix in SUFFIXES)
    return next(filter(os.path.isfile, paths), None)


def weight_files(folder: str, use_safetensors: bool | None = None) -> list[str]:
    """Paths of the files that hold the model's weights: safetensors if present, else `.bin`.

    use_safetensors: True takes no `.bin`, False no safetensors
    Raises FileNotFoundError when there are none or the index names one that is missing, ValueError
    when the index is damaged or names something outside of its folder.
    """
    kinds = [
        pair
        for pair in WEIGHT_FILES
        if use_safetensors is None or pair[1].endswith(".safetensors") is bool(use_safetensors)
    ]
    for index, single in kinds:
        if os.path.isfile(path := os.path.join(folder, index)):
            names = index_names(path)
            paths = [os.path.join(folder, name) for name in names]
            if missing := [n for n, p in zip(names, paths, strict=True) if not os.path.isfile(p)]:
                raise FileNotFoundError(f"{path} names missing files: {', '.join(missing)}")
            return paths
        if os.path.isfile(path := os.path.join(folder, single)):
            return [path]
    raise FileNotFoundError(
        f"{folder} holds no model weights (looked for "
        f"{', '.join(name for pair in kinds for name in pair)}"
        f"{'' if use_safetensors is None else f'; use_safetensors is {use_safetensors}'})"
    )


def index_names(path: str) -> list[str]:
    """The names of the files an index lists, each once and sorted; all lie beside the index."""
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path} has no weight_map: it must say which file holds which weight")
    for name in table.values():
        plain = isinstance(name, str) and re.fullmatch(r"[\w.+-]+\.(safetensors|bin)", name)
        if not plain:
            raise ValueError(
                f"{path} is refused: it names {shown(name)}, expected the name of a .safetensors "
                "or .bin file in the same folder"
            )
    return sorted(set(table.values()))


def tensors_in(path: str, skip: Iterable[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of one file; a tensor is only good until the next one is asked for."""
    skip = set(skip)
    read = _safetensors_in if path.endswith(".safetensors") else _bin_in
    with damage_in_words(path):
        yield from read(path, skip)


@contextmanager
def damage_in_words(path: str) -> Iterator[None]:
    """A block that reads a weight file: what it raises but OSError becomes a ValueError."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it holds something other than tensors, which could run code "
            f"({first_line(error)})"
        ) from error
    except OSError:
        raise
    except Exception as error:  # readers of damaged files fail in every way there is
        raise ValueError(f"{path} is damaged or not a weight file: {first_line(error)}") from error


def share_files(folder: str) -> None:
    """Gives the safetensors in a folder the rights of any new file: the package, from 0.8 on,
    writes them for their owner alone, and whoever else reads the folder would lack the weights."""
    os.umask(hidden := os.umask(0o077))
    for entry in os.scandir(folder):
        if entry.name.endswith(".safetensors") and entry.is_file(follow_symlinks=False):
            rights = stat.S_IMODE(entry.stat().st_mode) | (0o666 & ~hidden)
            with suppress(PermissionError):  # a file of somebody else
                os.chmod(entry.path, rights)


def names_in(path: str) -> list[str]:
    """The names of the tensors of one file; of safetensors, without a look at these."""
    if not path.endswith(".safetensors"):
        return [name for name, _ in tensors_in(path)]
    with damage_in_words(path), safe_open(path, "pt") as file:
        return list(file.keys())


def metadata_in(path: str) -> dict[str, str]:
    """The texts that a safetensors file holds beside its tensors."""
    with damage_in_words(path), safe_open(path, "pt") as file:
        return file.metadata() or {}


def float_type_in(
    paths: Iterable[str], wanted: Callable[[str], bool] = lambda _: True
) -> torch.dtype | None:
    """The narrowest type that holds every wanted floating-point weight of these files as it is;
    None when there are none. Of safetensors, without a look at the weights."""
    found: set[torch.dtype | None] = set()
    for path in paths:
        if not path.endswith(".safetensors"):
            found |= {tensor.dtype for name, tensor in tensors_in(path) if wanted(name)}
            continue
        names = [name for name in names_in(path) if wanted(name)]
        with safe_open(path, "pt") as file:
            found |= {SAFETENSORS_FLOATS.get(file.get_slice(n).get_dtype()) for n in names}
    floats = found & set(FLOATS)
    return reduce(torch.promote_types, floats) if floats else None


def check_numbers(name: str, tensor: Tensor, source: str) -> None:
    """Raises ValueError unless a weight holds floating-point numbers that stand for themselves."""
    if tensor.dtype not in FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"{source}: {name} holds {kind} numbers, expected floating-point weights: {NO_PACKED}"
        )


def _safetensors_in(path: str, skip: set[str]) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name not in skip]
    for name in names:
        # Opened anew for each tensor: pages of a mapping count as memory until it is closed.
        with safe_open(path, "pt") as file:
            yield name, file.get_tensor(name)


def _bin_in(path: str, skip: set[str]) -> Iterator[tuple[str, Tensor]]:
    mmap = zipfile.is_zipfile(path)  # files of torch < 1.6 are no archives and cannot be mapped
    if mmap:
        _check_archive(path)
    limit = max(os.path.getsize(path) * MAPPED_SHARE, 1)
    tensors = _load_bin(path, mmap)
    names, mapped, count = [name for name in tensors if name not in skip], 0, 0
    for name in names:
        if mapped > limit:
            tensors, mapped = None, 0
            tensors = _load_bin(path, mmap)
        for full_name, tensor in _flat(name, tensors[name]):
            if (count := count + 1) > MAX_TENSORS:
                raise ValueError(f"more than {MAX_TENSORS} tensors")
            _check_tensor(full_name, tensor)
            mapped += tensor.nbytes if mmap else 0
            yield full_name, tensor
            del tensor


def _load_bin(path: str, mmap: bool) -> dict:
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(tensors, dict):
        raise ValueError(f"it holds a {type(tensors).__name__}, expected names with tensors")
    return tensors


def _check_archive(path: str) -> None:
    """torch writes its archives uncompressed; another one could unfold to any size."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is a compressed archive, which torch does not write")


def _check_tensor(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless it is an ordinary tensor that is as large as it says."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ValueError(f"{shown(name)} is no ordinary tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{shown(name)} claims more numbers than the file holds")


def _flat(name: str, value, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """A tensor as it is; the tensors of a nested state dict as NAME.INNER."""
    if not isinstance(name, str):
        raise ValueError(f"{shown(name)} is no name of a tensor")
    if isinstance(value, Tensor):
        yield name, value
        return
    if not isinstance(value, dict):
        raise ValueError(f"{shown(name)} is a {type(value).__name__}, expected a tensor")
    if depth == MAX_DEPTH:
        raise ValueError(f"{shown(name)} is nested too deeply")
    for key, inner in value.items():
        yield from _flat(f"{name}.{key}", inner, depth + 1)
