"""Whole training runs on a tiny model: they learn, resume exactly, and write what can be loaded."""

import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaTokenizerFast, TrainerCallback

from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.pruning import build_pruner
from llava.train.llava_family import LlavaFamily
from llava.train.saving import PROJECTOR_FILE
from llava.train.train import prepare, train
from tests.conftest import TOWER
from tests.golden_data import GOLDEN
from tests.paths import ROOT
from tests.ports import free_port
from tests.train.train_tools import MUON, write_start

SAMPLES = json.loads((GOLDEN / "llava-base/train_data.json").read_text())["data"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a tower, a fresh LLaVA that names it relatively, and six samples."""
    folder = tmp_path_factory.mktemp("training")
    write_start(folder, "start", num_hidden_layers=2)
    (folder / "data.json").write_text(json.dumps([*SAMPLES, *SAMPLES[2:]]))
    return folder


def run(workplace, output, *flags, **options):
    return train(command_line(workplace, output, *flags), **options)


def command_line(workplace, output, *flags):
    words = {
        "--model_name_or_path": workplace / "start",
        "--version": "v1",
        "--data_path": workplace / "data.json",
        "--image_folder": GOLDEN / "images",
        "--output_dir": output,
        "--use_cpu": True,
        "--model_max_length": 512,
        "--per_device_train_batch_size": 2,
        "--learning_rate": 1e-2,
        "--lr_scheduler_type": "constant",
        "--logging_steps": 1,
        "--report_to": "none",
        "--disable_tqdm": True,
        "--num_train_epochs": 2,
        "--save_strategy": "no",
    }
    args = [str(word) for pair in words.items() for word in pair]
    return [*args, *map(str, flags)]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_loss_falls_and_the_result_loads_from_where_it_lies(workplace):
    output = workplace / "deep/er/full"
    trainer = run(workplace, output, "--num_train_epochs", 4)
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    config = json.loads((output / "config.json").read_text())
    assert config["mm_vision_tower"] == "../../../tower" and config["conv_mode"] == "vicuna_v1"
    assert config["mm_projector_type"] == "mlp2x_gelu" and config["image_aspect_ratio"] == "pad"
    assert not any("vision_tower" in name for name in load_file(output / "model.safetensors"))
    again = parameters(LlavaLlamaForCausalLM.from_pretrained(output))
    trained = parameters(trainer.model)
    assert all(torch.equal(again[name], trained[name]) for name in again)


def test_a_loss_that_is_no_number_is_logged_as_it_is(workplace, tmp_path):
    trainer = run(workplace, tmp_path, "--learning_rate", 1e20, "--max_steps", 3)
    assert math.isfinite(losses(trainer)[0]) and math.isnan(losses(trainer)[-1])


def test_the_trainer_can_be_used_when_its_run_has_ended(workplace, tmp_path):
    trainer = run(workplace, tmp_path, "--max_steps", 1)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0


def test_defaults_of_generation_that_transformers_does_not_save_are_kept(workplace, tmp_path):
    # Those of Vicuna and LLaVA-1.5: a temperature without sampling.
    values = {"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}
    shutil.copytree(workplace / "start", workplace / "warm")
    (workplace / "warm/generation_config.json").write_text(json.dumps(values))
    flags = ["--model_name_or_path", workplace / "warm", "--max_steps", 1]
    flags += ["--save_strategy", "steps", "--save_steps", 1]
    trainer = run(workplace, tmp_path / "out", *flags)
    trainer.model.save_pretrained(tmp_path / "again")
    assert trainer.model.generation_config.temperature == 0.9
    for folder in ("out", "out/checkpoint-1", "again"):
        saved = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert values.items() <= saved.items(), folder


@pytest.mark.parametrize(
    "flags",
    [
        ["--group_by_modality_length", True, *MUON],
        ["--tune_mm_mlp_adapter", True, "--dataloader_num_workers", 1],
        ["--lora_enable", True, "--lora_r", 4, "--lora_dropout", 0.2, "--mm_projector_lr", 1e-3],
    ],
    ids=["full", "projector", "lora"],
)
@pytest.mark.parametrize("at", [2, 4])
def test_a_resumed_run_continues_exactly(workplace, tmp_path, flags, at):
    # Three steps make an epoch: one run stops in the first, the other in the second.
    flags = [*flags, "--save_strategy", "steps", "--save_steps", at]
    whole = run(workplace, tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / f"whole/checkpoint-{at}", tmp_path / f"rest/checkpoint-{at}")
    rest = run(workplace, tmp_path / "rest", *flags)
    assert losses(rest) == losses(whole)
    expected = parameters(whole.model)
    assert all(torch.equal(p, expected[name]) for name, p in parameters(rest.model).items())


@pytest.mark.parametrize("accumulation", [4, 8])
def test_a_run_whose_batches_fill_no_whole_steps_resumes_exactly(workplace, tmp_path, accumulation):
    # Six batches make an epoch: one step and a half, or three quarters of one.
    flags = ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", accumulation]
    flags += ["--num_train_epochs", 3, "--save_strategy", "steps", "--save_steps", 1]
    flags += ["--tune_mm_mlp_adapter", True]
    whole = run(workplace, tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "saved")
    named = ["--resume_from_checkpoint", tmp_path / "saved"]
    rest = run(workplace, tmp_path / "rest", *flags, *named)
    assert whole.state.global_step == 3 and losses(rest) == losses(whole)
    assert [e["epoch"] for e in whole.state.log_history if "loss" in e] == [1, 2, 3]
    expected = parameters(whole.model)
    assert all(torch.equal(p, expected[name]) for name, p in parameters(rest.model).items())


def test_only_the_projector_is_trained_and_saved(workplace, tmp_path):
    trainer = run(workplace, tmp_path, "--tune_mm_mlp_adapter", True, "--version", "v1")
    start = parameters(LlavaLlamaForCausalLM.from_pretrained(workplace / "start"))
    trained = parameters(trainer.model)
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    saved = torch.load(tmp_path / PROJECTOR_FILE, weights_only=True)
    assert changed == set(saved) and all("mm_projector" in name for name in saved)
    assert (tmp_path / "config.json").exists() and not list(tmp_path.glob("model*"))
    adapted = run(
        workplace, tmp_path / "next", "--pretrain_mm_mlp_adapter", tmp_path / PROJECTOR_FILE,
        "--max_steps", 1, "--learning_rate", 0,
    )  # fmt: skip
    after = parameters(adapted.model)
    assert all(torch.equal(after[name], value) for name, value in saved.items())


def test_a_projector_of_a_checkpoint_folder_is_written_beside_it(workplace, tmp_path):
    output = tmp_path / "checkpoint-9"
    run(workplace, output, "--tune_mm_mlp_adapter", True, "--max_steps", 1)
    assert (tmp_path / "mm_projector/checkpoint-9.bin").exists()


def test_a_lora_run_writes_adapter_and_projector(workplace, tmp_path):
    trainer = run(workplace, tmp_path, "--lora_enable", True, "--lora_r", 4, "--max_steps", 3)
    others = torch.load(tmp_path / "non_lora_trainables.bin", weights_only=True)
    prefix = "base_model.model.model.mm_projector."
    assert set(others) == {f"{prefix}{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    names = ("adapter_model.safetensors", "config.json")
    assert len({(tmp_path / name).stat().st_mode for name in names}) == 1
    assert len(adapter) == 2 * 7 * 2 and not any("vision_tower" in name for name in adapter)

    from peft import PeftModel

    base = LlavaLlamaForCausalLM.from_pretrained(workplace / "start")
    base.load_state_dict({n.removeprefix("base_model.model."): v for n, v in others.items()}, False)
    merged = parameters(PeftModel.from_pretrained(base, tmp_path).merge_and_unload())
    trained = parameters(trainer.model.merge_and_unload())
    for name, value in merged.items():
        assert torch.allclose(value, trained[name], atol=1e-6), name


def test_biases_that_are_trained_beside_an_adapter_load_with_it(workplace, tmp_path):
    flags = ["--lora_enable", True, "--lora_r", 4, "--lora_bias", "all", "--max_steps", 1]
    trained = run(workplace, tmp_path, *flags).model.merge_and_unload()
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("vision_tower" in name for name in adapter)  # which is frozen
    model = with_base(tmp_path, workplace / "start")
    expected = parameters(trained)
    for name, value in parameters(model).items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


def test_bfloat16_keeps_float32_weights_and_writes_bfloat16(workplace, tmp_path):
    trainer = run(workplace, tmp_path, "--bf16", True, "--num_train_epochs", 4)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.model.lm_head.weight.dtype == torch.float32
    assert trainer.model.get_vision_tower().dtype == torch.bfloat16
    saved = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_pruning_method_can_be_trained_with(workplace, tmp_path):
    steps = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            steps.append(repr(model.pruner))

    flags = ["--pruning_method", "random", "--visual_token_num", 9, "--max_steps", 2]
    run(workplace, tmp_path / "flags", *flags, callbacks=[Watch()])
    run(
        workplace, tmp_path / "object", "--max_steps", 1,
        pruner=build_pruner("random", visual_token_num=5), callbacks=[Watch()],
    )  # fmt: skip
    assert [f"visual_token_num={n}" in text for n, text in zip((9, 9, 5), steps, strict=True)]
    with pytest.raises(ValueError, match="beside pruning_method"):
        run(workplace, tmp_path, *flags, pruner=build_pruner("random"))


def test_an_unfrozen_tower_learns_and_is_saved_with_the_model(workplace, tmp_path):
    flags = ["--unfreeze_mm_vision_tower", True, "--mm_vision_tower_lr", 1e-3, "--max_steps", 2]
    trainer = run(workplace, tmp_path, *flags)
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    trained = trainer.model.get_vision_tower().vision_tower.state_dict()[name]
    assert not torch.equal(trained, load_file(workplace / "tower/model.safetensors")[name])
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.get_vision_tower().vision_tower.state_dict()[name], trained)


def test_a_tower_that_is_trained_beside_the_projector_alone_is_saved_with_it(workplace, tmp_path):
    flags = ["--tune_mm_mlp_adapter", True, "--unfreeze_mm_vision_tower", True]
    flags += ["--save_strategy", "steps", "--save_steps", 1, "--max_steps", 2]
    trained = parameters(run(workplace, tmp_path, *flags).model)
    again = parameters(LlavaLlamaForCausalLM.from_pretrained(tmp_path))
    assert all(torch.equal(again[name], value) for name, value in trained.items())
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "rest/checkpoint-1")
    resumed = parameters(run(workplace, tmp_path / "rest", *flags).model)
    assert all(torch.equal(resumed[name], value) for name, value in trained.items())
    # A projector that is trained on that tower, which stays as it is now, is saved alone.
    flags = ["--model_name_or_path", tmp_path, "--tune_mm_mlp_adapter", True, "--max_steps", 1]
    run(workplace, tmp_path / "next", *flags)
    assert (tmp_path / "next" / PROJECTOR_FILE).exists()


def test_processes_do_not_wait_for_layers_of_a_tower_that_do_not_run(workplace, tmp_path):
    flags = ["--unfreeze_mm_vision_tower", True, "--gradient_checkpointing", True]
    trainer = prepare(command_line(workplace, tmp_path, *flags))
    unused = trainer.model.get_vision_tower().vision_tower.vision_model.post_layernorm.weight
    assert unused.requires_grad and trainer.args.ddp_find_unused_parameters


def test_a_tokenizer_without_an_unknown_token_pads_with_its_end_mark():
    tokenizer = SimpleNamespace(unk_token=None, eos_token="</s>", pad_token=None)
    LlavaFamily().choose_template(tokenizer, SimpleNamespace(config=SimpleNamespace()), "v1")
    assert tokenizer.pad_token == "</s>"


def test_training_reads_a_tokenizer_json_where_that_is_all_there_is(tmp_path):
    fast = LlamaTokenizerFast.from_pretrained(GOLDEN / "tiny-llava-v1.5")
    fast.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    shutil.copyfile(GOLDEN / "tiny-llava-v1.5/config.json", tmp_path / "config.json")
    args = SimpleNamespace(cache_dir=None, model_max_length=512)
    tokenizer = LlavaFamily(str(tmp_path)).load_tokenizer(args)
    assert tokenizer("What is it?").input_ids == fast("What is it?").input_ids
    assert tokenizer.padding_side == "right"


def language_model(workplace, folder):
    """Flags that give the language model of `workplace`, written to `folder`, an anyres tower."""
    config = json.loads((workplace / "start/config.json").read_text())
    plain = {k: v for k, v in config.items() if not k.startswith(("mm_", "image_", "unfreeze"))}
    plain |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    shutil.copytree(workplace / "start", folder)
    (folder / "config.json").write_text(json.dumps(plain))
    return [
        "--model_name_or_path", folder, "--vision_tower", workplace / "tower",
        "--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", -2,
        "--mm_use_im_patch_token", False, "--image_aspect_ratio", "anyres",
        "--mm_patch_merge_type", "spatial_unpad", "--max_steps", 1,
    ]  # fmt: skip


def test_a_plain_language_model_gets_vision_modules(workplace, tmp_path):
    trainer = run(workplace, tmp_path / "out", *language_model(workplace, tmp_path / "language"))
    config = trainer.model.config
    assert config.mm_hidden_size == TOWER["hidden_size"] and config.mm_vision_select_layer == -2
    assert config.image_grid_pinpoints[0] == [84, 168]
    assert "model.image_newline" in load_file(tmp_path / "out/model.safetensors")


def with_base(folder, base):
    """The model that a projector or an adapter in `folder` makes of `base`."""
    options = {"device": "cpu", "torch_dtype": torch.float32}
    return load_pretrained_model(str(folder), str(base), folder.name, **options)[1]


def test_a_projector_alone_loads_onto_the_language_model_it_was_trained_with(workplace, tmp_path):
    flags = [*language_model(workplace, tmp_path / "language"), "--tune_mm_mlp_adapter", True]
    trained = run(workplace, tmp_path / "out", *flags).model
    model = with_base(tmp_path / "out", tmp_path / "language")
    newline = trained.model.image_newline.half().float()  # the loader rounds what such files hold
    assert torch.equal(model.model.image_newline, newline)


def test_a_projector_that_is_kept_fixed_is_saved_beside_an_adapter(workplace, tmp_path):
    flags = [*language_model(workplace, tmp_path / "language"), "--lora_enable", True]
    flags += ["--lora_r", 4, "--freeze_mm_mlp_adapter", True]
    trained = run(workplace, tmp_path / "out", *flags).model.get_base_model().model
    model = with_base(tmp_path / "out", tmp_path / "language").model
    for name, value in trained.mm_projector.state_dict().items():
        assert torch.equal(model.mm_projector.state_dict()[name], value)
    assert torch.equal(model.image_newline, trained.image_newline)


def test_the_decoder_attends_as_it_is_told(workplace, tmp_path):
    words = command_line(workplace, tmp_path)
    for asked in ("eager", "sdpa"):
        layers = prepare(words, attn_implementation=asked).model.model.layers
        assert {layer.self_attn.backend for layer in layers} == {asked}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mm_projector_type", "linear"], "does not fit the checkpoint"),
        (["--matrix_optim", "sgd"], "choose same or muon"),
        (["--bits", "3"], "choose 4, 8 or 16"),
        (["--label_masks", "none"], "'exact' or 'released'"),
        (["--pruning_method", "nothing"], "unknown pruning method"),
        (["--max_pixels", "9000"], "--max_pixels: images for .*start have one size"),
        (["--image_aspect_ratio", "padded"], "--image_aspect_ratio must be square or pad"),
        (["--mm_patch_merge_type", "unpad"], "--mm_patch_merge_type must be flat or spatial"),
    ],
)
def test_wrong_flags_are_explained(workplace, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(workplace, tmp_path, "--max_steps", 1, *flags)


@pytest.mark.slow
def test_two_processes_do_the_work_of_one(workplace, tmp_path):
    # Each process takes every other batch, as gradient accumulation does in one process. Three
    # steps make an epoch.
    flags = ["--max_steps", 4, "--optim", "sgd", "--group_by_modality_length", True]
    flags += ["--per_device_train_batch_size", 1]
    words = command_line(workplace, tmp_path / "two", *flags, "--ddp_backend", "gloo")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost"}
    subprocess.run(
        [*launcher, "--master_port", str(free_port()), "-m", "llava.train.train", *words],
        check=True, timeout=1800, cwd=ROOT, env=environment,
    )  # fmt: skip
    one = run(workplace, tmp_path / "one", *flags, "--gradient_accumulation_steps", 2)
    two = load_file(tmp_path / "two/model.safetensors")
    trained = parameters(one.model)
    for name, value in two.items():
        assert torch.allclose(value, trained[name], atol=1e-5), name
