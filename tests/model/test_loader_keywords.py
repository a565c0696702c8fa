"""Keywords of `load_pretrained_model` that programs for other versions of LLaVA pass."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from llava.model.builder import load_pretrained_model
from llava.pruning.twigvlm import TwigVLM
from tests.golden_data import SHIPPED
from tests.model.checkpoint_tools import write_adapter

CHECKPOINT = SHIPPED / "tiny-llava-v1.5"
TOWER = SHIPPED / "tiny-clip-vit-l14-336"


def load(folder=CHECKPOINT, name="tiny-llava", **options):
    return load_pretrained_model(str(folder), None, name, device="cpu", **options)


def moved_copy(folder, tower=str(TOWER)):
    """The checkpoint in another folder, which names its tower by `tower`."""
    shutil.copytree(CHECKPOINT, folder, dirs_exist_ok=True)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_vision_tower": tower}))
    return folder


def copy_as_bin(folder):
    """The checkpoint with its weights in pytorch_model.bin."""
    (moved_copy(folder) / "model.safetensors").unlink()
    torch.save(load_file(CHECKPOINT / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def test_an_unknown_keyword_is_a_type_error_so_that_callers_can_try_without():
    with pytest.raises(
        TypeError, match="unexpected keyword argument 'colour', 'customized_config'"
    ):
        load(colour="red", customized_config=None)


def test_keywords_of_other_versions_are_accepted():
    for said in (True, False):
        options = {"multimodal": said, "low_cpu_mem_usage": said, "trust_remote_code": False}
        assert load(**options, cache_dir=None, use_safetensors=None)[2] is not None


def test_an_empty_base_is_none():
    """As programs give it whose option for it was left empty."""
    model = load_pretrained_model(str(CHECKPOINT), "", "tiny-llava", device="cpu")[1]
    assert model.get_vision_tower().is_loaded


def test_an_unknown_strategy_is_said_before_weights_are_read(tmp_path):
    (moved_copy(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="unknown generation_strategy 'fast', choose from auto"):
        load(tmp_path, generation_strategy="fast")


def test_code_of_a_checkpoint_is_refused():
    with pytest.raises(ValueError, match="trust_remote_code=True is refused: no code"):
        load(trust_remote_code=True)


def test_multimodal_insists_on_images_where_the_config_does_not_mention_them(tmp_path):
    folder = moved_copy(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    plain = {key: v for key, v in config.items() if not key.startswith(("mm_", "use_mm", "image_"))}
    (folder / "config.json").write_text(json.dumps(plain))
    with pytest.warns(UserWarning, match="weights the model has no place for"):
        assert load(folder, name="llava")[2] is None
    with pytest.raises(ValueError, match="names no vision tower"):
        load(folder, name="llava", multimodal=True)


def test_use_safetensors_is_honoured(tmp_path):
    folder = copy_as_bin(tmp_path / "bin")
    assert load(folder)[2] is not None and load(folder, use_safetensors=False)[2] is not None
    with pytest.raises(FileNotFoundError, match="use_safetensors is True"):
        load(folder, use_safetensors=True)
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin; use_safetensors is False"):
        load(use_safetensors=False)
    with pytest.raises(FileNotFoundError, match="use_safetensors is True"):
        load_pretrained_model(str(folder), None, "plain", device="cpu", use_safetensors=True)


def test_use_safetensors_says_which_files_are_downloaded(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns, cache_dir):
        always = {"*.json", "*.model", "*.txt", "non_lora_trainables.bin"}
        asked.append(sorted(set(allow_patterns) - always))
        return str(CHECKPOINT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FileNotFoundError):
        load("some/llava", use_safetensors=False)
    load("some/llava", use_safetensors=True)
    assert asked == [["*.bin", "*.pt"], ["*.safetensors"]]


def test_what_was_trained_beside_an_adapter_comes_with_it_from_the_hub(tmp_path, monkeypatch):
    """The adapter is in safetensors, as PEFT writes it, the projector beside it is not."""
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    repository.mkdir()
    write_adapter(repository, load_file(CHECKPOINT / "model.safetensors"))

    def download(name, allow_patterns, cache_dir):
        cache.mkdir(exist_ok=True)
        for path in repository.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = load_pretrained_model("some/lora", str(CHECKPOINT), "tiny-llava-lora", device="cpu")[1]
    assert (model.get_model().mm_projector[0].bias == 1).all(), "that of the base"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """(name, cache_dir) of every look-up of a hub that knows some/llava and its tower."""
    asked = []

    def download(name, allow_patterns, cache_dir):
        asked.append((name, cache_dir))
        if name == "openai/tower":
            return str(TOWER)
        if name != "some/llava":
            raise OSError("no such repository")
        return str(moved_copy(tmp_path / "model", "openai/tower"))

    def one_file(name, file, cache_dir):
        asked.append((name, cache_dir))
        return str(TOWER / file)

    def from_pretrained(kind, name, cache_dir=None, own=CLIPImageProcessor.from_pretrained):
        asked.append((name, cache_dir))
        return own(TOWER)

    monkeypatch.setattr(CLIPImageProcessor, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one_file)
    return asked


def test_everything_on_the_hub_is_looked_up_in_the_cache_folder(hub, tmp_path):
    """Model, tower and trained part; afterwards the hub's own place counts again."""
    cache = str(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="some/twig"):
        load("some/llava", cache_dir=cache, twig="some/twig")
    assert set(hub) == {(n, cache) for n in ("some/llava", "openai/tower", "some/twig")}
    hub.clear()
    assert load("some/llava")[2] is not None
    assert set(hub) == {("some/llava", None), ("openai/tower", None)}


def test_the_published_config_of_a_method_works_in_the_loader(tmp_path):
    from llava.pruning.twigvlm import grow_twig, save_twig

    model = load()[1]
    save_twig(str(tmp_path), grow_twig(model, 2, 1).state_dict(), 2, "tiny")
    config = {
        "enable_FastV": True,
        "attention_rank": 96,
        "generation_strategy": "self_speculative",
    }
    model = load(twig=str(tmp_path), twigvlm_config=config)[1]
    assert isinstance(model.pruner, TwigVLM) and model.pruner.visual_token_num == 96
    assert model.pruner.enable_pruning and model.generation_strategy == "self_speculative"
    assert model.pruner.as_published
    assert not load(twig=str(tmp_path))[1].pruner.as_published
