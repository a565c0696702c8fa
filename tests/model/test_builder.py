"""Loading checkpoints: every layout gives the same model, and what is wrong is named."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM
from llava.model import checkpoint as files
from llava.model.apply_delta import apply_delta
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import write_checkpoint
from llava.model.consolidate import consolidate_ckpt
from llava.model.make_delta import make_delta
from llava.pruning import build_pruner
from tests.model.checkpoint_tools import (
    CHECKPOINT,
    NEXT,
    TOWER,
    copy_of,
    load,
    same,
    write_adapter,
)
from tests.paths import ROOT


@pytest.fixture(scope="module")
def weights():
    return load_file(CHECKPOINT / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    return copy_of(CHECKPOINT, tmp_path / "tiny-llava")


# Layouts.


def test_a_checkpoint_loads_with_tokenizer_processor_and_context_length(weights):
    tokenizer, model, processor, context_len = load(CHECKPOINT)
    assert isinstance(model, LlavaLlamaForCausalLM) and not model.training
    assert same(model, weights) and model.dtype == torch.float32
    assert model.get_vision_tower().is_loaded and processor.crop_size["height"] == 336
    assert len(tokenizer) == model.config.vocab_size and context_len == 2048
    assert model.generation_config.max_length == 4096
    assert repr(model.pruner) == repr(build_pruner("none"))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_and_their_index_load(folder, weights, kind):
    names = sorted(weights)
    shards = {f"part-{i}.{kind}": {n: weights[n] for n in names[i::3]} for i in range(3)}
    for name, tensors in shards.items():
        save = save_file if kind == "safetensors" else torch.save
        save(tensors, folder / name)
    stem = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    weight_map = {n: name for name, tensors in shards.items() for n in tensors}
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(load(folder)[1], weights)
    (folder / f"part-1.{kind}").unlink()
    with pytest.raises(FileNotFoundError, match=f"missing files: part-1.{kind}"):
        load(folder)


@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_a_single_bin_file_loads(folder, weights, archive):
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    assert same(load(folder)[1], weights)


def test_safetensors_are_preferred(folder, weights):
    save_file(weights, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    assert same(load(folder)[1], weights)


def test_large_checkpoints_are_written_in_shards_that_load_again(folder, weights, monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 400_000)
    write_checkpoint(str(folder), weights)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert same(load(folder)[1], weights)


def test_a_checkpoint_in_one_file_takes_the_place_of_one_in_several(folder, weights, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files, "SHARD_BYTES", 400_000)
        write_checkpoint(str(folder), weights)
    others = {name: tensor + 1 for name, tensor in weights.items()}
    write_checkpoint(str(folder), others)
    assert same(load(folder)[1], others)


@pytest.mark.parametrize("model_type", ["llava", "llava_llama", "llama"])
def test_the_class_follows_the_architecture_not_the_model_type(tmp_path, model_type):
    folder = copy_of(CHECKPOINT, tmp_path / "m", weights=True, model_type=model_type)
    model = load(folder, name="some-name")[1]
    assert isinstance(model, LlavaLlamaForCausalLM) and model.config.model_type == "llava_llama"


def test_a_mistral_checkpoint_with_grouped_heads_loads(tmp_path, weights):
    folder = copy_of(
        CHECKPOINT,
        tmp_path / "m",
        architectures=["LlavaMistralForCausalLM"],
        model_type="llava_mistral",
        num_key_value_heads=2,
        sliding_window=None,
    )
    grouped = {
        n: t[:16].clone() if "k_proj" in n or "v_proj" in n else t for n, t in weights.items()
    }
    save_file(grouped, folder / "model.safetensors")
    model = load(folder, name="llava-mistral")[1]
    assert isinstance(model, LlavaMistralForCausalLM) and same(model, grouped)


def test_a_projector_goes_on_top_of_its_base(folder, weights):
    names = [name for name in weights if "mm_projector" in name]
    projector = {name: weights[name] * 0.5 for name in names}
    torch.save(projector, folder / "mm_projector.bin")
    model = load(folder, CHECKPOINT)[1]
    state = model.state_dict()
    assert all(torch.equal(state[name], projector[name].half().float()) for name in names)
    assert same(model, {n: t for n, t in weights.items() if n not in names})


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 4.0), ({"use_rslora": True}, 8 / 2**0.5), ({"rank_pattern": {"q_proj": 4}}, 2.0)],
    ids=["plain", "rank-stabilised", "own rank"],
)
def test_an_adapter_is_merged_into_its_base(folder, weights, settings, scale):
    before, update = write_adapter(folder, weights, **settings)
    model = load(folder, CHECKPOINT, name="llava-lora")[1]
    assert model.config._name_or_path == str(folder)  # a part for the base alone is not for it
    state = model.state_dict()
    merged = state["model.layers.3.self_attn.q_proj.weight"]
    assert torch.allclose(merged, before + scale * update, atol=1e-5)
    assert torch.equal(state["model.mm_projector.0.bias"], torch.ones(32))
    name = "model.layers.2.self_attn.q_proj.weight"
    assert torch.equal(state[name], weights[name])


def test_an_adapter_of_another_kind_is_refused(folder, weights):
    write_adapter(folder, weights, use_dora=True)
    with pytest.raises(ValueError, match="DoRA are not supported"):
        load(folder, CHECKPOINT, name="llava-lora")


@pytest.fixture
def plain(tmp_path):
    """A language model without images."""
    config = LlamaConfig(
        vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    folder = tmp_path / "vicuna"
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(CHECKPOINT / name, folder / name)
    return folder


def test_a_plain_language_model_loads_without_a_processor(plain):
    tokenizer, model, processor, _ = load(plain, name="vicuna")
    assert processor is None and type(model) is LlamaForCausalLM
    prompt, expected = torch.tensor([[1, 5, 6]]), LlamaForCausalLM.from_pretrained(plain)
    assert torch.equal(model(prompt).logits, expected(prompt).logits)
    with pytest.raises(ValueError, match="plain language model"):
        load(plain, name="vicuna", pruner="random")


def test_a_projector_on_a_plain_base_needs_no_other_vision_weights(folder, plain, weights):
    names = [name for name in weights if "mm_projector" in name]
    torch.save({name: weights[name] for name in names}, folder / "mm_projector.bin")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(values | {"num_hidden_layers": 2, "intermediate_size": 48})
    )
    assert load(folder, plain)[1].get_vision_tower().is_loaded


# The vision tower.


def test_the_tower_saved_with_the_model_is_used_when_it_was_trained(tmp_path):
    trained = {
        f"model.vision_tower.vision_tower.{name}": tensor + 1
        for name, tensor in load_file(TOWER / "model.safetensors").items()
        if name.startswith("vision_model.")
    }
    everything = load_file(CHECKPOINT / "model.safetensors") | trained
    name = "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias"
    for unfreeze in (True, False):
        folder = copy_of(CHECKPOINT, tmp_path / str(unfreeze), unfreeze_mm_vision_tower=unfreeze)
        save_file(everything, folder / "model.safetensors")
        shift = load(folder)[1].state_dict()[name] - (trained[name] - 1)
        assert torch.allclose(shift, torch.full_like(shift, float(unfreeze)), atol=1e-6)
    del everything[name]
    save_file(everything, copy_of(
        CHECKPOINT, tmp_path / "part", unfreeze_mm_vision_tower=True
    ) / "model.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="part of a vision tower"):
        load(tmp_path / "part")


def test_a_trained_tower_that_was_not_saved_comes_from_its_folder(tmp_path):
    folder = copy_of(CHECKPOINT, tmp_path / "m", weights=True, unfreeze_mm_vision_tower=True)
    state = load(folder)[1].get_vision_tower().vision_tower.state_dict()
    saved = load_file(TOWER / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in state.items())


def test_another_tower_can_be_named(tmp_path):
    folder = copy_of(CHECKPOINT, tmp_path / "m", weights=True, mm_vision_tower="../nowhere")
    with pytest.raises(ValueError, match="--vision-tower"):
        load(folder)
    assert load(folder, vision_tower=str(TOWER))[1].get_vision_tower().is_loaded


def test_a_checkpoint_without_a_tower_is_refused_at_once(tmp_path):
    folder = copy_of(CHECKPOINT, tmp_path / "m", weights=True, mm_vision_tower=None)
    with pytest.raises(ValueError, match="names no vision tower"):
        load(folder)


def test_a_tower_can_run_in_a_type_of_its_own():
    model = load(CHECKPOINT, torch_dtype=torch.bfloat16, vision_tower_dtype=torch.float32)[1]
    assert model.dtype == torch.bfloat16 and model.get_vision_tower().dtype == torch.float32
    assert load(CHECKPOINT, torch_dtype="bfloat16")[1].get_vision_tower().dtype == torch.bfloat16


# Options.


@pytest.mark.parametrize(
    "options", [{"pruner": "random"}, {"pruner": build_pruner("random")}], ids=["name", "object"]
)
def test_the_pruning_method_is_a_name_or_an_object(options):
    assert load(CHECKPOINT, **options)[1].pruner.name == "random"


def test_published_keywords_choose_their_method():
    pruner = load(CHECKPOINT, visual_token_num=48, important_ratio=0.75)[1].pruner
    assert (pruner.name, pruner.visual_token_num, pruner.important_ratio) == ("vispruner", 48, 0.75)


def test_an_unknown_keyword_is_named():
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        load(CHECKPOINT, colour="red")


def test_a_budget_that_does_not_fit_is_refused_while_loading():
    with pytest.raises(ValueError, match="577"):
        load(CHECKPOINT, visual_token_num=577)


@pytest.mark.parametrize(
    "device_map", [{"": "cpu"}, "cpu", {"model": "cpu", "lm_head": "cpu"}, None]
)
def test_device_maps_of_every_form_work(device_map):
    model = load_pretrained_model(str(CHECKPOINT), None, "llava", device_map=device_map)[1]
    expected = "cpu" if device_map or not torch.cuda.is_available() else "cuda"
    assert model.device.type == expected


def test_an_absent_device_is_named():
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ValueError, match="no CUDA device"):
        load_pretrained_model(str(CHECKPOINT), None, "llava", device="cuda")


@pytest.mark.parametrize("option", ["load_8bit", "load_4bit"])
def test_quantisation_without_its_package_names_the_extra(option, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"\[quant\]"):
        load(CHECKPOINT, **{option: True})


def test_flash_attention_is_refused_where_it_cannot_run():
    with pytest.raises((ImportError, ValueError), match="flash"):
        load(CHECKPOINT, use_flash_attn=True)


@pytest.mark.parametrize(("patch", "start_end", "new"), [(True, False, 1), (True, True, 3)])
def test_marker_tokens_extend_the_vocabulary(tmp_path, patch, start_end, new):
    folder = copy_of(
        CHECKPOINT, tmp_path / "m", True, mm_use_im_patch_token=patch, mm_use_im_start_end=start_end
    )
    tokenizer, model, _, _ = load(folder)
    assert len(tokenizer) == 700 + new == model.lm_head.out_features
    assert model.get_input_embeddings().num_embeddings == 700 + new


# What is wrong is named.


def test_missing_weights_are_an_error_that_names_them(folder, weights):
    kept = {n: t for n, t in weights.items() if n != "model.norm.weight"}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lacks 1 weights: model.norm.weight"):
        load(folder)


def test_weights_without_a_place_are_a_warning_except_known_leftovers(folder, weights):
    known = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | known, folder / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)
    save_file(weights | {"model.extra": torch.ones(1)}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="not used: model.extra"):
        load(folder)


def test_a_weight_of_the_wrong_shape_is_named(folder, weights):
    save_file(weights | {"model.norm.weight": torch.ones(31)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(31,\), .* \(32,\)"):
        load(folder)


class Attack:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "mm_projector.bin", "non_lora_trainables.bin"]
)
def test_a_pickle_with_code_is_refused(folder, name, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "non_lora_trainables.bin":
        write_adapter(folder, weights)
    (folder / name).write_bytes(pickle.dumps({"model.norm.weight": Attack()}))
    base = None if name == "pytorch_model.bin" else CHECKPOINT
    with pytest.raises(ValueError, match=f"{name} is refused"):
        load(folder, base, name="llava-lora" if "lora" in name else "llava")
    assert not (tmp_path / "hacked").exists()


def test_code_beside_the_weights_is_not_run(tmp_path):
    folder = copy_of(CHECKPOINT, tmp_path / "m", True, auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert load(folder)[1] is not None


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_file_is_named(folder, name):
    (folder / name).write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00 rubbish")
    with pytest.raises(ValueError, match=name):
        load(folder)


def test_a_folder_without_weights_says_what_it_looked_for(folder):
    with pytest.raises(FileNotFoundError, match="no model weights .*safetensors"):
        load(folder)
    with pytest.raises(FileNotFoundError, match="neither mm_projector.bin nor an adapter"):
        load(folder, CHECKPOINT)


def test_a_missing_folder_config_or_tokenizer_is_named(tmp_path, folder, weights):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        load(tmp_path)
    save_file(weights, folder / "model.safetensors")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        load(folder)


# Memory.

PEAK = textwrap.dedent("""
    import gc, resource, sys, threading, time
    import torch
    from llava.model.builder import load_pretrained_model

    def resident():
        pages = open("/proc/self/statm").read().split()[1]
        return int(pages) * resource.getpagesize()

    def watch():
        while not done:
            peak[0] = max(peak[0], resident())
            time.sleep(0.002)

    folder, small, dtype = sys.argv[1:]
    load_pretrained_model(small, None, "llava", device="cpu")
    gc.collect()
    start, done = resident(), False
    peak = [start]
    thread = threading.Thread(target=watch)
    thread.start()
    model = load_pretrained_model(folder, None, "llava", device="cpu", torch_dtype=dtype)[1]
    done = True
    thread.join()
    size = sum(p.nbytes for p in model.parameters())
    print((peak[0] - start) / size)
""")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("kind", "saved", "loaded"),
    [
        ("safetensors", torch.float16, "float32"),
        pytest.param("bin", torch.float32, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_loading_takes_little_more_memory_than_the_model(tmp_path, kind, saved, loaded):
    # About 75 million weights, with large embeddings as real checkpoints have them.
    width, layers = 1024, 5
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    folder = copy_of(CHECKPOINT, tmp_path / "llava", **sizes)
    weights = load_file(CHECKPOINT / "model.safetensors")
    shape = {32: width, 64: 3 * width}
    tensors = {
        name: torch.zeros([shape.get(n, n) for n in tensor.shape], dtype=saved)
        for name, tensor in weights.items()
        if "layers." not in name or int(name.split(".")[2]) < layers
    }
    tensors["model.mm_projector.0.weight"] = torch.zeros(width, 32, dtype=saved)
    if kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", PEAK, folder, CHECKPOINT, loaded],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.2


# Tools.


def test_consolidation_keeps_what_belongs_to_the_model(tmp_path, weights):
    source = copy_of(
        CHECKPOINT, tmp_path / "src", mm_vision_tower=os.path.relpath(TOWER, tmp_path / "src")
    )
    extra = {"model.vision_tower.vision_tower.x": torch.ones(1)}
    torch.save(weights | extra, source / "pytorch_model.bin")
    consolidate_ckpt(str(source), str(tmp_path / "a" / "dst"))
    written = load_file(tmp_path / "a" / "dst" / "model.safetensors")
    assert set(written) == set(weights)
    assert all(torch.equal(written[n], t.half()) for n, t in weights.items())
    assert load(tmp_path / "a" / "dst")[1].dtype == torch.float32


def test_a_delta_and_its_base_give_the_model_back(tmp_path, plain, weights):
    base = tmp_path / "base"
    shutil.copytree(plain, base)
    own = {n: t for n, t in weights.items() if "projector" not in n}
    save_file(
        {n: t[:600] if "lm_head" in n else t * 0.5 for n, t in own.items()},
        base / "model.safetensors",
    )
    make_delta(str(base), str(CHECKPOINT), str(tmp_path / "delta"))
    apply_delta(str(base), str(tmp_path / "out"), str(tmp_path / "delta"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(written[n].float(), t, atol=2e-3) for n, t in weights.items())
    assert load(tmp_path / "out")[1] is not None
    save_file({"model.norm.weight": torch.ones(32)}, base / "model.safetensors")
    with pytest.raises(ValueError, match="not in the base model"):
        apply_delta(str(base), str(tmp_path / "out"), str(tmp_path / "delta"))


def test_merging_an_adapter_and_extracting_its_projector(folder, weights, tmp_path):
    from scripts.extract_mm_projector import extract
    from scripts.merge_lora_weights import merge_lora

    before, update = write_adapter(folder, weights)
    adapter = folder.rename(tmp_path / "llava-lora")
    merge_lora(str(adapter), str(CHECKPOINT), str(tmp_path / "merged"))
    state = load(tmp_path / "merged", name="merged")[1].state_dict()
    merged = state["model.layers.3.self_attn.q_proj.weight"]
    # Merged in fp16, which rounds the product and the sum to 2 ** -11 of values up to some tens.
    assert torch.allclose(merged, before + 4 * update, atol=2e-2, rtol=2**-9)
    extract(str(tmp_path / "merged"), str(tmp_path / "new" / "mm_projector.bin"))
    projector = torch.load(tmp_path / "new" / "mm_projector.bin", weights_only=True)
    assert set(projector) == {n for n in weights if "projector" in n}
    extract(str(NEXT), str(tmp_path / "next.safetensors"))
    assert "model.image_newline" in load_file(tmp_path / "next.safetensors")
