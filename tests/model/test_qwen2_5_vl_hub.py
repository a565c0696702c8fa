"""Qwen2.5-VL by its name on the hub, from the cache of downloads, without a network."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llava.model.builder import load_pretrained_model
from llava.model.language_model.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from tests.model.checkpoint_tools import same
from tests.paths import GOLDEN

NAME = "Qwen/Qwen2.5-VL-3B-Instruct"
CHECKPOINT = GOLDEN / "tiny-qwen2.5-vl-cut"
REVISION = 40 * "a"


@pytest.fixture(scope="module")
def weights():
    return load_file(CHECKPOINT / "model.safetensors")


@pytest.fixture(scope="module")
def cache(tmp_path_factory, weights):
    """A cache as huggingface_hub fills it: files by their digest, links by their name, and weights
    in two files, as large models have them."""
    cache = tmp_path_factory.mktemp("hub")
    place = cache / f"models--{NAME.replace('/', '--')}"
    snapshot, blobs = place / "snapshots" / REVISION, place / "blobs"
    for folder in (snapshot, blobs, place / "refs"):
        folder.mkdir(parents=True)
    (place / "refs" / "main").write_text(REVISION)

    def put(name: str, write) -> None:
        blob = blobs / f"digest-of-{name}"
        write(blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")

    for path in CHECKPOINT.iterdir():
        if path.suffix != ".safetensors":
            put(path.name, lambda blob, path=path: blob.write_bytes(path.read_bytes()))
    names, index = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        tensors = {name: weights[name] for name in part}
        put(file, lambda blob, own=tensors: save_file(own, blob, {"format": "pt"}))
        index |= dict.fromkeys(part, file)
    total = {"total_size": sum(w.numel() * w.element_size() for w in weights.values())}
    content = json.dumps({"metadata": total, "weight_map": index})
    put("model.safetensors.index.json", lambda blob: blob.write_text(content))
    return cache


def test_transformers_loads_it_by_name(cache, weights):
    options = {"cache_dir": cache, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(NAME, **options)
    assert type(model) is Qwen2_5_VLForConditionalGeneration and same(model, weights)
    assert AutoConfig.from_pretrained(NAME, **options).vision_config.depth == len(
        model.visual.blocks
    )


def test_our_loader_takes_the_same_name(cache, weights, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tokenizer, model, processor, _ = load_pretrained_model(
        NAME, None, "", device="cpu", cache_dir=str(cache)
    )
    assert same(model, weights) and tokenizer.is_fast and processor.merge_size == 2
