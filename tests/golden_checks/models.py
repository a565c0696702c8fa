"""Checkpoints of recorded cases, loaded once per process."""

import json
import shutil
import tempfile
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image

from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.pruning import build_pruner
from tests.golden_cases import locate

#: what checkpoints have compiled: attribute of a model -> whether, that which assigns others first
_compiled = {"compile_decoding": False, "compile_prefill": False}


@contextmanager
def compiling(decoding: bool = False, prefill: bool = False):
    """Inside, checkpoints come with compiled steps of decoding, or layers on prompts and of towers,
    or both."""
    before = dict(_compiled)
    _compiled.update(compile_decoding=decoding, compile_prefill=prefill)
    try:
        yield
    finally:
        _compiled.update(before)


@lru_cache(maxsize=3)
def _load(path: Path, changes: str):
    name = path.name
    with tempfile.TemporaryDirectory() as folder:
        if changes != "{}":
            config = json.loads((path / "config.json").read_text()) | json.loads(changes)
            tower = (path / config["mm_vision_tower"]).resolve()
            config["mm_vision_tower"] = str(tower)
            path = Path(shutil.copytree(path, Path(folder) / name, copy_function=_link))
            (path / "config.json").unlink()
            (path / "config.json").write_text(json.dumps(config))
        tokenizer, model, processor, _ = load_pretrained_model(
            str(path), None, name, device="cpu", torch_dtype=torch.float32
        )
    return tokenizer, model, processor


def _link(source, target):
    Path(target).symlink_to(source)


def load_checkpoint(name: str, folder: Path, changes: dict | None = None):
    """(tokenizer, model, image processor) in float32 on the CPU, without pruning.

    changes: config values that differ from those of the checkpoint
    """
    parts = _load(locate(name, folder), json.dumps(changes or {}, sort_keys=True))
    parts[1].pruner = build_pruner("none")
    parts[1].as_in_training = None
    for name, wanted in _compiled.items():
        if getattr(parts[1], name) != wanted:
            setattr(parts[1], name, wanted)
    return parts


def open_images(names: list[str], folder: Path) -> list[Image.Image]:
    return [Image.open(locate(name, folder)).convert("RGB") for name in names]


def prepare(images: list[Image.Image], model, processor, as_list: bool = False):
    """(pixels, sizes) as `model.generate` takes them; (None, None) without images."""
    if not images:
        return None, None
    pixels = process_images(images, processor, model.config)
    return (list(pixels) if as_list else pixels), [image.size for image in images]
