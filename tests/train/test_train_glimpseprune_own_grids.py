"""Training of GlimpsePrune on Qwen2.5-VL: labels, masks on grids, limits, runs, released parts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.constants import IGNORE_INDEX
from llava.conv_mode import CONFIG_KEY
from llava.front_end import FrontEnd
from llava.mm_utils import load_image
from llava.model.builder import load_pretrained_model
from llava.pruning import build_pruner, trace_pruning
from llava.train.glimpse.arguments import with_config
from llava.train.glimpse.batches import (
    BoxCollator,
    BoxDataset,
    LengthLimits,
    ModelFacts,
    box_mask,
)
from llava.train.glimpse.data import BoxSample
from llava.train.glimpse.loss import GlimpseObjective
from llava.train.sampler import ChunkSampler
from llava.train.train_glimpseprune import train
from tests.golden_data import GOLDEN
from tests.paths import ROOT
from tests.ports import free_port
from tests.train import glimpse_speed
from tests.train.recipes import needs_bash, words_of
from tests.train.test_train_glimpseprune import command_line, losses, write_boxes
from tests.train.train_tools import write_own_grids_start

TEMPLATE_MARK = "<|im_start|>"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a tiny Qwen2.5-VL, and boxes around halves of the recorded pictures."""
    folder = tmp_path_factory.mktemp("own_grids")
    write_own_grids_start(folder / "llava")
    write_boxes(folder)
    return folder


@pytest.fixture(scope="module")
def front(workplace):
    tokenizer, model, processor, _ = load(workplace)
    return FrontEnd(tokenizer, ModelFacts.of(model), processor, "qwen2_5_vl")


def load(workplace, **options):
    folder = str(workplace / "llava")
    return load_pretrained_model(folder, None, "", device="cpu", torch_dtype="float32", **options)


def sample_of(workplace, number=0, **changes):
    path = sorted((workplace / "cot/gqa").glob("*.png"))[number]
    values = {"question": "Where?", "answer": "There.", "path": str(path), "boxes": [[0, 0, 9, 9]]}
    return BoxSample(**{**values, **changes})


# --- samples --------------------------------------------------------------------------------------


def behind_the_third_token(ids: list[int], mark: int) -> list[int]:
    """The published labels: all that follows the third token from the last `mark` on."""
    first = len(ids) - ids[::-1].index(mark) - 1 + 3
    return [IGNORE_INDEX] * first + ids[first:]


@pytest.mark.skipif(
    not (GOLDEN / "glimpseprune-qwen/utils.json").is_file(), reason="needs the recorded values"
)
def test_the_published_rule_for_labels_is_the_recorded_one():
    recorded = json.loads((GOLDEN / "glimpseprune-qwen/utils.json").read_text())["sft_labels"]
    for ids, wanted in zip(recorded["input_ids"], recorded["out"], strict=True):
        assert behind_the_third_token(ids, recorded["im_start_id"]) == wanted


@pytest.mark.parametrize("answer", ["Yes", "The shape on the left is green.", "a\nb", "héllo 3.5"])
def test_an_answer_is_learned_with_its_end_and_nothing_in_front_of_it(workplace, front, answer):
    dataset = BoxDataset([sample_of(workplace, answer=answer)], front)
    item = dataset.texts(dataset.samples[0])
    ids = torch.cat([item["prompt"], item["answer"]]).tolist()
    labels = [IGNORE_INDEX] * len(item["prompt"]) + item["labels"].tolist()
    mark = front.tokenizer.convert_tokens_to_ids(TEMPLATE_MARK)
    assert labels == behind_the_third_token(ids, mark)
    assert front.tokenizer.decode(item["answer"]) == f"{answer}<|im_end|>\n"
    # It is what the model is asked with: the prompt of an answer.
    assert torch.equal(item["prompt"], front.encode(front.prompt("Where?", num_images=1)))


def test_boxes_are_shares_of_the_picture_as_it_is():
    mask = box_mask([[0, 0, 100, 50]], (200, 100), (4, 8), "whole")
    assert mask.long().sum(dim=1).tolist() == [5, 5, 5, 0]  # both ends of a box count


def test_every_picture_has_a_mask_on_its_own_grid(workplace, front):
    boxes = [[0, 0, 1e4, 1e4]]
    samples = [sample_of(workplace, number, boxes=boxes) for number in range(4)]
    dataset = BoxDataset(samples, front)
    batch = BoxCollator(front.pad_id)([dataset[number] for number in range(4)])
    shapes = [tuple(image.shape[:2]) for image in batch["images"]]
    assert [tuple(mask.shape) for mask in batch["masks"]] == shapes and len(set(shapes)) > 1
    assert all(mask.all() for mask in batch["masks"])


def test_samples_beyond_a_limit_are_left_out_and_counted(workplace, front, caplog):
    small, large = sample_of(workplace, boxes=[]), sample_of(workplace, boxes=None)
    dataset = BoxDataset([small, large], front)
    size = load_image(small.path).size
    text = len(dataset.texts(small)["prompt"]) - 1
    visual = dataset[0]["mask"].numel()
    assert front.image_processor.grid(size) == tuple(dataset[0]["mask"].shape)

    dataset.keep_within(LengthLimits(text + visual, text + visual))
    assert len(dataset) == 2 and not caplog.records
    dataset.keep_within(LengthLimits(max_input_remain_seq_length=text + visual - 1))
    assert dataset.samples == [small]
    assert "1 of 2 samples are left out: max_input_remain_seq_length" in caplog.text
    with pytest.raises(ValueError, match="no sample is left: max_input_seq_length"):
        dataset.keep_within(LengthLimits(max_input_seq_length=text + visual - 1))


def test_pictures_without_a_place_on_a_grid_are_left_out(workplace, front, tmp_path, caplog):
    Image.new("RGB", (20, 90)).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_text("no picture")
    paths = [tmp_path / "small.png", tmp_path / "broken.png"]
    bad = [sample_of(workplace, path=str(path)) for path in paths]
    dataset = BoxDataset([sample_of(workplace), *bad], front)
    dataset.keep_within(LengthLimits())
    assert dataset.samples == [sample_of(workplace)]
    assert "too small or too thin" in caplog.text and "cannot be opened" in caplog.text


def test_chunks_are_whole_and_questions_repeat_in_a_row(caplog):
    sampler = ChunkSampler(10, seed=3, chunk=8, repeats=2)
    assert "2 of 10 samples, others in every epoch, are left out" in caplog.text
    order = list(sampler)
    assert len(order) == len(sampler) == 16 and order[::2] == order[1::2]
    once = torch.randperm(10, generator=torch.Generator().manual_seed(3)).tolist()
    assert order[::2] == once[:8]
    sampler.start_epoch(1)
    assert list(sampler) != order
    with pytest.raises(ValueError, match="num_generations 3 must divide the 8 answers"):
        ChunkSampler(10, seed=3, chunk=8, repeats=3)
    with pytest.raises(ValueError, match="3 samples do not fill one step, which takes 8"):
        ChunkSampler(3, seed=3, chunk=8)


# --- runs -----------------------------------------------------------------------------------------


def pruned(tokenizer, model, processor, workplace):
    """(new tokens, trace) of a question about two pictures of different grids."""
    front, question = FrontEnd(tokenizer, model, processor, "qwen2_5_vl"), "What is on the left?"
    prompts = [front.encode(front.prompt(question, num_images=1))] * 2
    paths = [sample_of(workplace, number).path for number in range(2)]
    pictures = [[front.picture(load_image(path))] for path in paths]
    inputs = front.inputs(prompts, pictures, [question] * 2)
    with trace_pruning(model) as trace:
        ids = model.generate(**inputs, max_new_tokens=4, eos_token_id=-1, do_sample=False)
    return ids, trace


def with_part(workplace, folder):
    """(tokenizer, model, processor) that prune with a trained part."""
    pruner = build_pruner("glimpseprune", new_modules=str(folder))
    return load(workplace, pruner=pruner)[:3]


def test_a_run_learns_and_its_released_part_prunes_as_what_was_trained(workplace, tmp_path):
    flags = ["--save_layout", "released", "--max_remain_ratio", 0.4, "--selected_layers", 1]
    trainer = train(command_line(workplace, tmp_path / "out", *flags))
    assert sum(losses(trainer)[-3:]) < sum(losses(trainer)[:3]) - 0.5
    located = [entry["loc_loss"] for entry in trainer.state.log_history if "loc_loss" in entry]
    assert sum(located[-3:]) < sum(located[:3])

    parts = torch.load(tmp_path / "out/new_modules_gp.pt", weights_only=True)
    assert set(parts) == {"learnable_embeddings", "le_proj", "le_norm", "attn_fuser"}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "qwen2_5_vl_gp" and config["vision_config"]["depth"] == 4
    assert config["use_attention_logits"] is True and config[CONFIG_KEY] == "qwen2_5_vl"
    assert not (tmp_path / "out/model.safetensors").exists()

    tokenizer, model, processor = with_part(workplace, tmp_path / "out")
    for name, value in model.pruner.module.state_dict().items():
        assert torch.equal(value, trainer.part.state_dict()[name]), name
    ids, trace = pruned(tokenizer, model, processor, workplace)
    trainer.model.llava.pruner.max_remain_ratio = 0.4
    wanted, own = pruned(tokenizer, trainer.model.llava.eval(), processor, workplace)
    assert torch.equal(ids, wanted)
    counts = torch.stack(trace.visual_tokens)
    assert torch.equal(counts, torch.stack(own.visual_tokens))
    assert (counts[-1] == (0.4 * counts[0]).long()).all()


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(workplace, tmp_path):
    flags = ["--save_steps", 2, "--num_train_epochs", 2, "--deep_supervision", True]
    whole = train(command_line(workplace, tmp_path / "whole", *flags))
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "rest/checkpoint-2")
    rest = train(command_line(workplace, tmp_path / "rest", *flags))
    assert losses(rest) == losses(whole)
    for name, value in whole.part.state_dict().items():
        assert torch.equal(value, rest.part.state_dict()[name]), name


@pytest.fixture(scope="module")
def one_batch(workplace, tmp_path_factory):
    """Three steps of whole batches; answers are as long as one another, so that a mean over the
    tokens of a batch is one over its samples."""
    flags = [*SAME_STEPS, "--per_device_train_batch_size", 4]
    return train(command_line(workplace, tmp_path_factory.mktemp("one"), *flags)).part.state_dict()


SAME_STEPS = ["--max_steps", 3, "--le_dropout_prob", 0, "--learning_rate", 1e-3]


def same(weights, wanted) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, atol=2e-5, rtol=1e-3)


def test_accumulated_steps_are_those_of_one_large_batch(workplace, tmp_path, one_batch):
    flags = ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4]
    trainer = train(command_line(workplace, tmp_path, *SAME_STEPS, *flags))
    same(trainer.part.state_dict(), one_batch)


def test_a_predictor_can_be_trained_without_a_glimpse(workplace, tmp_path):
    flags = ["--max_steps", 2, "--le_length", 0, "--selected_layers", 1]
    trainer = train(command_line(workplace, tmp_path, *flags))
    assert {name.partition(".")[0] for name in trainer.part.state_dict()} == {"attn_fuser"}
    ids, _ = pruned(*with_part(workplace, tmp_path), workplace)
    assert ids.shape == (2, 4)


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(workplace, tmp_path, one_batch):
    flags = ["--ddp_backend", "gloo", "--per_device_train_batch_size", 2]
    words = command_line(workplace, tmp_path / "two", *SAME_STEPS, *flags)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_port", str(free_port()), "-m", "llava.train.train_glimpseprune"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost"}
    subprocess.run([*launcher, *words], check=True, timeout=1800, cwd=ROOT, env=environment)
    _, model, _, _ = load(
        workplace, pruner=build_pruner("glimpseprune", new_modules=str(tmp_path / "two"))
    )
    same(model.pruner.module.state_dict(), one_batch)


def test_an_adapter_is_merged_into_the_model_that_is_pruned(workplace, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = load(workplace)[1]
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    wanted = adapted.merge_and_unload().model.layers[0].self_attn.q_proj.weight

    flags = ["--adapter_dir", tmp_path / "adapter", "--max_steps", 1]
    trainer = train(command_line(workplace, tmp_path / "out", *flags))
    merged = trainer.model.llava.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(merged, wanted)
    assert not torch.allclose(merged, before, atol=1e-3)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["base_model"], config["adapter_dir"]) == ("llava", "adapter")


def test_what_is_held_out_is_judged_beside(workplace, tmp_path):
    flags = ["--eval_dataset", workplace / "boxes.jsonl", "--evaluation_strategy", "steps"]
    trainer = train(command_line(workplace, tmp_path, "--max_steps", 1, "--eval_steps", 1, *flags))
    judged = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert {"eval_le_loss", "eval_loc_loss", "eval_iou"} <= set(judged)
    parts = judged["eval_le_loss"] + judged["eval_loc_loss"]
    assert judged["eval_loss"] == pytest.approx(parts, abs=1e-3)


def test_pixels_bound_the_grids(workplace, tmp_path):
    flags = ["--max_steps", 1, "--max_pixels", 12 * 28 * 28]
    trainer = train(command_line(workplace, tmp_path, *flags))
    assert all(trainer.train_dataset[number]["mask"].numel() <= 12 for number in range(8))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward_weight", 1], "reward_weight cannot be set"),
        (["--lora_enable", True], "lora_enable cannot be set"),
        (["--num_generations", 4], "num_generations cannot be set"),
        (["--save_layout", "x"], "save_layout 'x' is unknown, choose from ours, released"),
        (["--attn_fuse_hidden_act", "gelu"], "choose silu"),
        (["--use_ref_masks", True], "must be False: training keeps all"),
    ],
)
def test_what_this_program_does_not_train_is_refused(workplace, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        train(command_line(workplace, tmp_path, *flags))


@pytest.mark.parametrize("family", ["LLaVA", "Qwen2.5-VL"])
def test_prompts_without_gradients_give_the_losses_and_gradients_of_one_pass(tmp_path, family):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    torch.manual_seed(0)
    model, pixels, grid = glimpse_speed.models(tmp_path, num_attention_heads=4, **sizes)[family]
    small = {"attn_fuse_size": 16, "visual_cond_size": 16}
    glimpse_speed.give_glimpse(model, le_length=2, selected_layers=(0, 1), **small)
    batch = glimpse_speed.batch_of(pixels, grid, 2)
    found = []
    for objective in (GlimpseObjective(model), glimpse_speed.OnePass(model)):
        objective.eval()(**batch)["loss"].backward()
        found.append([p.grad.clone() for p in objective.glimpse.parameters()])
        objective.glimpse.zero_grad()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)
    assert any(gradient.abs().max() > 1e-4 for gradient in found[0])


# --- the recipe -----------------------------------------------------------------------------------


@needs_bash
@pytest.mark.parametrize(("size", "layer", "depth"), [("3b", 23, 36), ("7b", 18, 28)])
def test_the_recipes_have_the_published_settings(monkeypatch, size, layer, depth):
    ((program, *words),) = words_of("qwen2_5_vl/train_glimpse.sh", size, "--seed", 7)
    assert program == "llava.train.train_glimpseprune" and words[-2:] == ["--seed", "7"]
    assert f"Qwen/Qwen2.5-VL-{size.upper()}-Instruct" in words
    monkeypatch.chdir(ROOT)
    config = Path(words[words.index("--config") + 1])
    assert config.is_file() and Path(words[words.index("--train_dataset") + 1]).is_file()
    words = with_config(words)
    place = words.index("--le_layers") + 1
    assert words[place : place + depth] == [str(number) for number in range(depth)]
    for flag in ("selected_layers", "reduce_layer"):
        assert words[words.index(f"--{flag}") + 1] == str(layer)


def test_all_keys_of_the_published_recipes_are_flags(workplace, tmp_path):
    recipe = ROOT / "scripts/qwen2_5_vl/train_glimpse_3b.yaml"
    small = ["--selected_layers", 1, "--reduce_layer", 1, "--le_layers", 0, 1]
    small += ["--selected_visual_layers", 3, 1, "--bf16", False, "--max_steps", 1]
    small += ["--dataloader_num_workers", 0, "--max_pixels", 40 * 28 * 28]
    words = ["--config", str(recipe), *command_line(workplace, tmp_path, *small)]
    trainer = train(words)
    assert trainer.part.config.selected_visual_layers == (3, 1)
    assert (tmp_path / "new_modules_gp.pt").is_file()
