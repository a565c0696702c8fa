"""What a checkpoint is: config and files decide, and what is not supported is refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser

from llava.model import LlavaLlamaForCausalLM
from llava.model.utils import auto_upgrade
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.model_setup import checkpoint_kind, choose_family
from llava.weight_files import local_folder
from tests.model.checkpoint_tools import CHECKPOINT, NEXT, TOWER, copy_of, load, same, write_adapter


@pytest.fixture(scope="module")
def weights():
    return load_file(CHECKPOINT / "model.safetensors")


@pytest.fixture
def projector(weights):
    return {name: tensor for name, tensor in weights.items() if "mm_projector" in name}


# Names do not decide.


@pytest.mark.parametrize(
    "name",
    [
        "llava-v1.5-7b-prompt-tuned",
        "llava-attempt2",
        "my-lora-model",
        "mistral-beats-it",
        "v1.6-34b",
        "checkpoint-500",
        "finetuned",
        "snapshots/0f1e2d3c",
    ],
)
def test_a_copy_of_any_name_is_the_same_model(tmp_path, weights, name):
    folder = copy_of(CHECKPOINT, tmp_path / name, weights=True)
    tokenizer, model, processor, _ = load(folder, name=name.split("/")[-1])
    assert type(model) is LlavaLlamaForCausalLM and same(model, weights)
    assert not tokenizer.is_fast and processor is not None


def test_a_plain_model_called_llava_is_a_plain_model(tmp_path):
    folder = copy_of(CHECKPOINT, tmp_path / "llava-7b")
    values = json.loads((folder / "config.json").read_text())
    values = {k: v for k, v in values.items() if not k.startswith("mm_")}
    values |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(values))
    tensors = load_file(CHECKPOINT / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if "projector" not in n}
    save_file(kept, folder / "model.safetensors")
    assert load(folder, name="llava-7b")[2] is None


def test_an_early_config_is_known_by_its_settings(tmp_path, weights):
    early = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    folder = copy_of(CHECKPOINT, tmp_path / "old", weights=True, **early)
    assert same(load(folder, name="old")[1], weights)
    values = json.loads((folder / "config.json").read_text())
    del values["architectures"]
    (folder / "config.json").write_text(json.dumps(values | {"model_type": "llava"}))
    assert same(load(folder, name="old")[1], weights)


def test_only_early_llava_configs_are_upgraded(tmp_path, monkeypatch):
    early = copy_of(CHECKPOINT, tmp_path / "llava-v0", model_type="llama", architectures=["X"])
    monkeypatch.setattr("builtins.input", lambda _: "n")
    with pytest.raises(SystemExit):
        auto_upgrade(str(early))
    monkeypatch.setattr("builtins.input", lambda _: "Y")
    assert auto_upgrade(str(early)) and not auto_upgrade(str(early))
    assert json.loads((early / "config.json").read_text())["model_type"] == "llava"
    named = copy_of(CHECKPOINT, tmp_path / "renamed", model_type="llama", architectures=["X"])
    assert auto_upgrade(str(named)), "the settings say what it is, whatever it is called"


# Other architectures.

FOREIGN = {
    "LlavaQwenForCausalLM": "Qwen language model",
    "LlavaGemmaForCausalLM": "Gemma language model",
    "LlavaPhiForCausalLM": "Phi language model",
    "LlavaMptForCausalLM": "MPT language model",
    "LlavaMixtralForCausalLM": "Mixtral language model",
    "LlavaOnevisionForConditionalGeneration": "LLaVA-OneVision",
    "Qwen2VLForConditionalGeneration": "a Qwen2-VL model",
    "PaliGemmaForConditionalGeneration": "'PaliGemmaForConditionalGeneration'",
    "LlavaFutureForCausalLM": "'LlavaFutureForCausalLM'",
    "BunnyPhiForCausalLM": "'BunnyPhiForCausalLM'",
}


@pytest.mark.parametrize("architecture", FOREIGN)
def test_another_architecture_is_refused_by_name(tmp_path, architecture):
    folder = copy_of(CHECKPOINT, tmp_path / "llava-7b", True, architectures=[architecture])
    for refuse in (lambda: load(folder, name="llava-7b"), lambda: checkpoint_kind(str(folder))):
        with pytest.raises(ValueError) as caught:
            refuse()
        message = str(caught.value)
        assert architecture in message and FOREIGN[architecture] in message
        assert "supported are LLaVA-1.5 and LLaVA-NeXT" in message and "\n" not in message


@pytest.mark.parametrize(
    "values, says",
    [
        ({"model_type": "vipllava", "text_config": {}, "vision_config": {}}, "'vipllava' model"),
        ({"model_type": "qwen2_vl", "hidden_size": 8}, "Qwen2-VL"),
        ({"model_type": "llava_qwen", "mm_vision_tower": "x"}, "Qwen language model"),
        ({"model_type": "clip_vision_model"}, "--vision-tower"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "--vision-tower"),
        ({"pruning_method": "twigvlm", "twig_K": 2}, "trained part of the pruning method"),
        ({"model_type": "llava_llama_gp", "mm_vision_tower": "x"}, "part of a pruning method, not"),
        ({"model_type": "qwen2_5_vl_gp", "vision_config": {}}, "part of a pruning method, not"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "'qwen3' model"),
        ({}, "neither architectures nor a model_type"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_other_configs_say_what_they_are(tmp_path, values, says):
    (tmp_path / "config.json").write_text(json.dumps(values or {"a": 1}))
    with pytest.raises(ValueError, match=says):
        load(tmp_path, name="llava")
    with pytest.raises(ValueError, match=says):
        checkpoint_kind(str(tmp_path))


@pytest.mark.parametrize(
    "files, says",
    [
        (["model-q4.gguf"], "llama.cpp"),
        (["consolidated.00.pth", "params.json"], "Meta's original layout"),
        (["model_index.json"], "diffusion"),
        (["zero_to_fp32.py", "latest"], "zero_to_fp32.py"),
        (["tokenizer.model"], "no checkpoint folder"),
        (["checkpoint-1/config.json", "checkpoint-2/config.json"], "checkpoint-1, checkpoint-2"),
        (["blobs/x", "snapshots/0f1e/config.json"], "name one of snapshots/0f1e"),
    ],
    ids=str,
)
def test_a_folder_without_a_config_says_what_it_seems_to_be(tmp_path, files, says):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("{}")
    for refuse in (lambda: load(tmp_path), lambda: checkpoint_kind(str(tmp_path))):
        with pytest.raises(FileNotFoundError, match=says):
            refuse()


def test_a_file_in_place_of_a_folder_is_named():
    with pytest.raises(NotADirectoryError, match="name the folder"):
        load(CHECKPOINT / "model.safetensors")


def test_training_refuses_a_decoder_of_another_size_than_its_config(tmp_path):
    folder = copy_of(CHECKPOINT, tmp_path / "m", weights=True, num_hidden_layers=31)
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))

    def load_to_train():
        model_args, data_args, training_args = parser.parse_args_into_dataclasses(args=words)
        family = choose_family(model_args, training_args, set())
        family.load_model(model_args, data_args, training_args, set())

    words = ["--model_name_or_path", str(folder), "--output_dir", str(tmp_path), "--use_cpu", "1"]
    with pytest.raises(ValueError, match="without a place.*model.layers.31"):
        load_to_train()
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 33}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks .*model.layers.32"):
        load_to_train()


# Adapters and projectors.


def test_an_adapter_or_projector_alone_asks_for_its_base(tmp_path, weights, projector):
    folder = copy_of(CHECKPOINT, tmp_path / "tuned")
    torch.save(projector, folder / "mm_projector.bin")
    with pytest.raises(ValueError, match="is a projector without its model: pass --model-base"):
        load(folder, name="tuned")
    write_adapter(folder, weights, base_model_name_or_path="lmsys/vicuna-7b-v1.5")
    for refuse in (lambda: load(folder, name="tuned"), lambda: checkpoint_kind(str(folder))):
        with pytest.raises(ValueError, match="LoRA adapter .*--model-base.*vicuna-7b-v1.5"):
            refuse()
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="pass --model-base"):
        load(folder, name="tuned")


def test_an_adapter_is_known_by_its_files(tmp_path, weights):
    folder = copy_of(CHECKPOINT, tmp_path / "tuned")
    before, update = write_adapter(folder, weights)
    name = "model.layers.3.self_attn.q_proj.weight"
    for config in (True, False):
        if not config:  # the config of the base has to do
            (folder / "config.json").unlink()
        merged = load(folder, CHECKPOINT, name="tuned")[1].state_dict()[name]
        assert torch.allclose(merged, before + 4 * update, atol=1e-5)


def test_a_projector_kept_beside_its_step_is_found(tmp_path, monkeypatch, projector):
    step = copy_of(CHECKPOINT, tmp_path / "run" / "checkpoint-7")
    (step.parent / "mm_projector").mkdir()
    torch.save(
        {n: t * 0.5 for n, t in projector.items()},
        step.parent / "mm_projector" / "checkpoint-7.bin",
    )
    monkeypatch.chdir(step.parent)
    with pytest.raises(ValueError, match="is a projector without its model"):
        load("checkpoint-7", name="checkpoint-7")
    state = load("checkpoint-7", CHECKPOINT, name="checkpoint-7")[1].state_dict()
    name = next(iter(projector))
    assert torch.equal(state[name], (projector[name] * 0.5).half().float())


def test_a_base_of_another_family_or_no_need_for_one_is_said(tmp_path, weights):
    folder = copy_of(CHECKPOINT, tmp_path / "tuned", architectures=["LlavaMistralForCausalLM"])
    write_adapter(folder, weights)
    with pytest.raises(ValueError, match="mistral model, but its base .* is a llama model"):
        load(folder, CHECKPOINT)
    with pytest.raises(FileNotFoundError, match="whole model, leave out the base"):
        load(CHECKPOINT, CHECKPOINT)
    base = copy_of(CHECKPOINT, tmp_path / "base", architectures=["Qwen2ForCausalLM"])
    with pytest.raises(ValueError, match="Qwen2ForCausalLM"):
        load(folder, base)


def test_a_projector_to_start_training_from_is_checked(tmp_path, model):
    start, path = model.get_model()._load_adapter, tmp_path / "mm_projector.bin"
    for tensors, says in (
        ({"model.mm_projector.0.weight": None}, "is a NoneType"),
        ({"model.mm_projector.0.weight": torch.ones(3, 3)}, "mm_projector_type 'mlp2x_gelu' fit"),
        ({"other": torch.ones(3)}, "none at all"),
    ):
        torch.save(tensors, path)
        with pytest.raises(ValueError, match=says):
            start(str(path))


# Towers of copies.


def test_a_copy_finds_the_tower_its_relative_path_has_lost(tmp_path):
    shutil.copytree(TOWER, tmp_path / "towers" / "tower")
    moved = copy_of(CHECKPOINT, tmp_path / "a" / "b" / "m", True, mm_vision_tower="../tower")
    with pytest.raises(ValueError, match="--vision-tower"):
        load(moved)
    shutil.copytree(TOWER, tmp_path / "tower")
    with pytest.warns(UserWarning, match="is not there, using .*/tower"):
        tower = load(moved)[1].get_vision_tower()
    assert tower.vision_tower_name == str(tmp_path / "tower")


def test_a_linked_checkpoint_finds_the_tower_beside_the_original(tmp_path):
    (tmp_path / "original").mkdir()
    shutil.copytree(TOWER, tmp_path / "original" / "tower")
    folder = copy_of(CHECKPOINT, tmp_path / "original" / "m", True, mm_vision_tower="../tower")
    (tmp_path / "link").symlink_to(folder)
    assert load(tmp_path / "link")[1].get_vision_tower().is_loaded


def test_a_bare_checkpoint_folder_loads(tmp_path, monkeypatch, weights):
    copy_of(CHECKPOINT, tmp_path / "checkpoint-7", weights=True)
    monkeypatch.chdir(tmp_path)
    assert same(load("checkpoint-7", name="checkpoint-7")[1], weights)


def test_a_next_checkpoint_of_any_name_keeps_its_newline(tmp_path):
    folder = copy_of(NEXT, tmp_path / "attempt", weights=True)
    model = load(folder, name="attempt")[1]
    saved = load_file(NEXT / "model-00002-of-00002.safetensors")["model.image_newline"]
    assert torch.equal(model.model.image_newline, saved)


def test_a_folder_that_is_not_there_is_told_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "checkpoints/llava-v1.5-13b").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    with pytest.raises(FileNotFoundError, match=r"\(checkpoints is one, and holds llava-v1.5-13b"):
        local_folder("checkpoints/llava-v1.5-7b")


def no_network(*_, **__):
    raise OSError("no network")


def test_the_class_that_is_left_out_on_purpose_says_so():
    with pytest.raises(ImportError, match="LlavaMptForCausalLM .* MPT is not supported; supported"):
        from llava.model import LlavaMptForCausalLM  # noqa: F401
