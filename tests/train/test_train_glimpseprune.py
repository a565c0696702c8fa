"""Training of GlimpsePrune: where boxes fall, what is read, and runs that learn and resume."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image

from llava.front_end import FrontEnd
from llava.model import LlavaLlamaForCausalLM
from llava.pruning import build_pruner
from llava.pruning.glimpseprune import WEIGHTS_FILES
from llava.pruning.glimpseprune_modules import Glimpse, GlimpseConfig
from llava.pruning.learned import read_part
from llava.train.glimpse.arguments import (
    BoxArguments,
    GlimpseArguments,
    GlimpseTrainingArguments,
    with_config,
)
from llava.train.glimpse.batches import BoxDataset, LengthLimits, ModelFacts, box_mask
from llava.train.glimpse.data import pixel_box, read_datasets, sampled
from llava.train.glimpse.loss import (
    GlimpseObjective,
    LossWeights,
    bce_loss,
    dice_loss,
    hits,
)
from llava.train.run import FlagParser
from llava.train.train_glimpseprune import found_boxes, remove_result, train
from tests.golden_data import GOLDEN
from tests.paths import ROOT
from tests.ports import free_port
from tests.train.recipes import needs_bash, words_of
from tests.train.train_tools import write_start

# --- boxes ----------------------------------------------------------------------------------------


def test_boxes_lie_where_the_tower_sees_them():
    whole = [[0, 0, 200, 100]]  # of a picture of 200 x 100: padded, it fills the middle rows
    seen = box_mask(whole, (200, 100), (4, 4), "pad")
    assert seen.long().sum(dim=1).tolist() == [0, 4, 4, 4]  # both ends of a box count
    assert box_mask(whole, (200, 100), (4, 4), "pad", "released").all()
    inner = box_mask([[10, 10, 190, 60]], (200, 100), (4, 4), "pad")
    assert inner.long().sum(dim=1).tolist() == [0, 4, 4, 0]


def test_boxes_outside_of_the_square_that_is_cut_out_are_left_out():
    left, middle = [0, 0, 40, 100], [60, 0, 90, 40]
    assert not box_mask([left], (200, 100), (4, 4), None).any()
    assert box_mask([left, middle], (200, 100), (4, 4), None).long().sum() == 4


def test_no_boxes_are_the_whole_picture():
    assert box_mask(None, (200, 100), (4, 4), "pad").all()


def test_boxes_of_every_type_become_corners_in_pixels():
    assert pixel_box([1, 2, 3, 4], "xyxy", (10, 20)) == [1, 2, 3, 4]
    assert pixel_box([1, 2, 3, 4], "xywh", (10, 20)) == [1, 2, 4, 6]
    assert pixel_box([100, 200, 500, 1000], "xyxy_norm1000", (10, 20)) == [1, 4, 5, 20]
    with pytest.raises(ValueError, match="bbox_type 'x' is unknown"):
        pixel_box([1, 2, 3, 4], "x", (10, 20))


# --- data ----------------------------------------------------------------------------------------


def test_sampling_takes_the_part_it_names():
    rows = list(range(10))
    assert sampled(rows, "first:3", 42) == [0, 1, 2]
    assert sampled(rows, "end:3", 42) == [7, 8, 9]
    assert sampled(rows, "end:30", 42) == rows
    assert sampled(rows, "random:4", 42) == sampled(rows, "random:10", 42)[:4]
    assert sorted(sampled(rows, "random:10", 42)) == rows != sampled(rows, "random:10", 42)
    with pytest.raises(ValueError, match="choose random:K"):
        sampled(rows, "some", 42)


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "cot/gqa").mkdir(parents=True)
    Image.new("RGB", (40, 20)).save(tmp_path / "cot/gqa/a.png")
    return tmp_path


def line(image="a.png", **changes):
    place = {"image": image, "width": 40, "height": 20, "dataset": "gqa", "split": "train"}
    return {"question": "What?", "answer": "A dog.", "bboxs": [[0, 0, 20, 10]], **place, **changes}


def test_a_yaml_file_names_data_sets_even_the_same_twice(pictures, caplog):
    rows = [line(), line("gone.png")]
    (pictures / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = {"json_path": str(pictures / "d.jsonl"), "sampling_seed": 1, "dataset_name": "x"}
    two = {**one, "mapper": "cot_train_fullmask", "prompt": "{} Briefly."}
    (pictures / "d.yaml").write_text(yaml.dump({"datasets": [one, two]}))
    samples = read_datasets(str(pictures / "d.yaml"), str(pictures), 42)
    assert [s.question for s in samples] == ["What?", "What? Briefly."]
    assert [s.boxes for s in samples] == [[[0, 0, 20, 10]], None]
    assert "2 of 4 samples are left out: their picture is missing" in caplog.text


def test_boxes_of_a_picture_that_was_made_smaller_lie_where_they_did(pictures, model):
    (pictures / "d.json").write_text(json.dumps([line(), line(width=400, height=200)]))
    small, large = read_datasets(str(pictures / "d.json"), str(pictures), 42)
    large.boxes = [[10 * edge for edge in large.boxes[0]]]
    dataset = BoxDataset([small, large], FrontEnd(None, ModelFacts.of(model), None, "vicuna_v1"))
    one, other = (dataset.mask(sample, (40, 20), (6, 6)) for sample in (small, large))
    assert torch.equal(one, other) and 0 < one.sum() < 36
    (pictures / "e.json").write_text(json.dumps([line(width=0)]))
    with pytest.raises(ValueError, match="width and height are .0, 20., expected numbers above 0"):
        read_datasets(str(pictures / "e.json"), str(pictures), 42)


def test_pictures_that_cannot_be_opened_are_left_out_before_the_first_step(
    pictures, model, caplog, monkeypatch
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # twice as many are refused
    (pictures / "cot/gqa/empty.png").touch()
    Image.new("RGB", (100, 50)).save(pictures / "cot/gqa/huge.png")
    (pictures / "d.json").write_text(json.dumps([line(), line("empty.png"), line("huge.png")]))
    samples = read_datasets(str(pictures / "d.json"), str(pictures), 42)
    dataset = BoxDataset(samples, FrontEnd(None, ModelFacts.of(model), None, "vicuna_v1"))
    dataset.keep_within(LengthLimits())
    assert [os.path.basename(sample.path) for sample in dataset.samples] == ["a.png"]
    assert "2 of 3 samples are left out: their picture cannot be opened" in caplog.text


def test_conversations_of_visual_cot_are_read(pictures):
    question = (
        "<image>\nWhere? Please provide the bounding box coordinate of the region that can help "
        "you answer the question better."
    )
    values = [question, "[0.1, 0.1, 0.2, 0.2]", "<image>", "There."]
    row = {
        "image": ["cot/gqa/a.png", "cot/gqa/a.png###[4, 2, 8, 6]"],
        "conversations": [{"from": "human", "value": value} for value in values],
    }
    (pictures / "b.json").write_text(json.dumps([row]))
    entry = {"json_path": str(pictures / "b.json"), "mapper": "cot_bench"}
    (pictures / "b.yaml").write_text(yaml.dump({"datasets": [entry]}))
    (sample,) = read_datasets(str(pictures / "b.yaml"), str(pictures), 42)
    assert (sample.question, sample.answer) == ("Where?", "There.")
    assert sample.boxes == [[4, 2, 8, 6]]
    assert read_datasets(entry["json_path"], str(pictures), 42) == [sample]  # without a yaml file


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"mapper": "x"}, "mapper 'x' is unknown"),
        ({"colour": 1}, "unknown key colour"),
        ({"additional_mappers": ["x"]}, "choose norm_bboxes"),
    ],
)
def test_what_a_data_set_cannot_be_is_told(pictures, entry, message):
    (pictures / "d.jsonl").write_text(json.dumps(line()))
    entry = {"json_path": str(pictures / "d.jsonl"), **entry}
    (pictures / "d.yaml").write_text(yaml.dump({"datasets": [entry]}))
    with pytest.raises(ValueError, match=message):
        read_datasets(str(pictures / "d.yaml"), str(pictures), 42)


def test_a_missing_file_is_named_with_the_list_that_names_it(pictures):
    (pictures / "d.yaml").write_text(yaml.dump({"datasets": [{"json_path": "a/b.jsonl"}]}))
    with pytest.raises(FileNotFoundError, match=r"d.yaml: its json_path a/b.jsonl is not there"):
        read_datasets(str(pictures / "d.yaml"), str(pictures), 42)


def test_lists_of_a_recipe_may_be_empty(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("anchor_positions: []\nle_layers: []\nle_length: 1\n")
    classes = GlimpseArguments, BoxArguments, GlimpseTrainingArguments
    words = with_config(["--config", str(recipe), "--output_dir", str(tmp_path)])
    given, *_ = FlagParser(classes).parse(words)
    assert given.anchor_positions == [] and given.le_length == 0  # no layers: no glimpse


# --- losses ---------------------------------------------------------------------------------------


def test_dice_compares_areas():
    wanted = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    sure = torch.tensor([[50.0, 50.0, -50.0, -50.0]])
    assert dice_loss(sure, wanted) == pytest.approx(0, abs=1e-6)
    assert dice_loss(-sure, wanted) == pytest.approx(1, abs=1e-6)
    assert hits(sure, torch.tensor([[True, False, True, False]])).tolist() == [1, 1, 1]


def test_found_boxes_are_shares():
    assert found_boxes([3, 1, 2]) == {"precision": 0.75, "recall": 0.6, "f1": 0.6667, "iou": 0.5}
    assert found_boxes([0, 0, 2])["recall"] == 0


def test_the_predictor_can_learn_where_something_is(model):
    torch.manual_seed(0)
    sizes = dict(attn_fuse_size=16, visual_cond_size=16)
    glimpse = Glimpse(GlimpseConfig.for_model(model, **sizes))
    glimpse.initialize()
    fuser = glimpse.attn_fuser
    rows, states = torch.randn(144, 4) - 6, [torch.randn(144, 24)] * 4
    wanted = (rows[:, 0] > -5.5).float().view(4, 36)
    optimizer = torch.optim.AdamW(fuser.parameters(), lr=5e-3)
    for _ in range(80):
        logits = fuser(rows, fuser.conditions(states), [(6, 6)] * 4)[-1].view(4, 36)
        loss = dice_loss(logits, wanted) + 0.1 * bce_loss(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found_boxes(hits(logits, wanted.bool()).tolist())["f1"] > 0.9


def test_a_loss_class_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="loc_loss_class 'L1' is unknown"):
        LossWeights(loc_loss_class="L1")


def test_prompts_are_not_cut_to_the_length_that_the_model_was_trained_with(workplace, tmp_path):
    found = []
    for limit in (2048, 16):
        shutil.copytree(workplace / "llava", workplace / f"limit{limit}")
        config = json.loads((workplace / "llava/config.json").read_text())
        config["tokenizer_model_max_length"] = limit
        (workplace / f"limit{limit}/config.json").write_text(json.dumps(config))
        flags = ["--model_name_or_path", workplace / f"limit{limit}", "--max_steps", 1]
        found.append(losses(train(command_line(workplace, tmp_path / str(limit), *flags))))
    assert found[0] == found[1]


# --- runs -----------------------------------------------------------------------------------------


def test_a_glimpse_is_trained_in_the_template_of_the_adapter(workplace, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = LlavaLlamaForCausalLM.from_pretrained(workplace / "llava")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    config = json.loads((workplace / "llava/config.json").read_text())
    (tmp_path / "adapter/config.json").write_text(json.dumps({**config, "conv_mode": "llava_v1"}))
    flags = ["--adapter_dir", tmp_path / "adapter", "--max_steps", 1]
    train(command_line(workplace, tmp_path / "out", *flags))
    assert json.loads((tmp_path / "out/config.json").read_text())["conv_mode"] == "llava_v1"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("glimpse"))


def make_workplace(folder):
    """A folder with a tiny LLaVA and boxes around halves of the recorded pictures."""
    write_start(folder, "llava", num_hidden_layers=3, initializer_range=0.05)
    write_boxes(folder)
    return folder


def write_boxes(folder):
    """The recorded pictures, and boxes around their halves."""
    (folder / "cot/gqa").mkdir(parents=True)
    rows = []
    for path in sorted((GOLDEN / "images").glob("*.png"))[:4]:
        width, height = Image.open(path).size
        shutil.copy(path, folder / "cot/gqa")
        for side in ("left", "right"):
            box = [0, 0, width / 2, height] if side == "left" else [width / 2, 0, width, height]
            question = f"What is on the {side}?"
            rows.append(line(path.name, width=width, height=height, question=question, bboxs=[box]))
    (folder / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command_line(workplace, output, *flags):
    words = {
        "--model_name_or_path": workplace / "llava",
        "--train_dataset": workplace / "boxes.jsonl",
        "--img_dir": workplace,
        "--output_dir": output,
        "--use_cpu": True,
        "--per_device_train_batch_size": 4,
        "--gradient_accumulation_steps": 1,
        "--learning_rate": 1e-2,
        "--lr_scheduler_type": "constant",
        "--logging_steps": 1,
        "--report_to": "none",
        "--disable_tqdm": True,
        "--num_train_epochs": 3,
        "--attn_fuse_size": 16,
        "--visual_cond_size": 32,
    }
    return [str(word) for pair in words.items() for word in pair] + [str(flag) for flag in flags]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_run_learns_resumes_exactly_and_can_be_used(workplace, tmp_path):
    flags = ["--save_steps", 4, "--num_train_epochs", 6]
    whole = train(command_line(workplace, tmp_path / "whole", *flags))
    assert sum(losses(whole)[-3:]) < sum(losses(whole)[:3]) - 0.5
    last = [entry for entry in whole.state.log_history if "f1" in entry][-1]
    assert {"le_loss", "loc_loss", "dice_loss", "bce_loss", "precision", "iou"} <= set(last)

    shutil.copytree(tmp_path / "whole/checkpoint-4", tmp_path / "rest/checkpoint-4")
    rest = train(command_line(workplace, tmp_path / "rest", *flags))
    assert losses(rest) == losses(whole)
    for name, value in whole.part.state_dict().items():
        assert torch.equal(value, rest.part.state_dict()[name]), name

    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert config["base_model"] == "llava" and config["pruning_method"] == "glimpseprune"
    assert config["conv_mode"] == "vicuna_v1"
    llava = LlavaLlamaForCausalLM.from_pretrained(workplace / "llava")
    llava.get_vision_tower().load_model()
    llava.pruner = build_pruner("glimpseprune", new_modules=str(tmp_path / "whole"))
    for name, value in llava.pruner.module.state_dict().items():
        assert torch.equal(value, whole.part.state_dict()[name]), name


def test_the_best_checkpoint_is_the_result_where_that_is_asked_for(workplace, tmp_path):
    flags = ["--eval_dataset", workplace / "boxes.jsonl", "--evaluation_strategy", "steps"]
    flags += ["--eval_steps", 1, "--save_steps", 1, "--max_steps", 3]
    flags += ["--load_best_model_at_end", True, "--greater_is_better", True]  # so not the last one
    trainer = train(command_line(workplace, tmp_path, *flags))
    best = trainer.state.best_model_checkpoint
    assert best != str(tmp_path / "checkpoint-3")
    for name, value in read_part(best)[1].items():
        assert torch.equal(value, trainer.part.state_dict()[name]), name


def test_the_best_checkpoint_can_be_that_which_finds_most_of_the_boxes(workplace, tmp_path):
    flags = ["--eval_dataset", workplace / "boxes.jsonl", "--evaluation_strategy", "steps"]
    flags += ["--eval_steps", 1, "--save_steps", 1, "--max_steps", 2]
    flags += ["--load_best_model_at_end", True, "--metric_for_best_model", "iou"]
    trainer = train(command_line(workplace, tmp_path, *flags))
    found = [entry["eval_iou"] for entry in trainer.state.log_history if "eval_iou" in entry]
    assert trainer.state.best_metric == max(found) and len(found) == 2


def test_nothing_but_the_part_is_trained(workplace, tmp_path):
    flags = ["--max_steps", 2, "--deep_supervision", True, "--le_length", 2]
    trainer = train(command_line(workplace, tmp_path, *flags))
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("pruner_module" in name for name in trained)
    fresh = LlavaLlamaForCausalLM.from_pretrained(workplace / "llava")
    now = dict(trainer.model.llava.named_parameters())
    for name, value in fresh.named_parameters():
        assert torch.equal(value, now[name]), name
    assert "dice_loss_3" in trainer.state.log_history[0]
    start = ["--load_new_modules", tmp_path, "--max_steps", 1, "--learning_rate", 0]
    again = train(command_line(workplace, tmp_path / "next", *start))
    for name, value in read_part(str(tmp_path))[1].items():
        assert torch.equal(value, again.part.state_dict()[name]), name
    with pytest.raises(ValueError, match="le_length 3 does not fit the trained part in"):
        train(command_line(workplace, tmp_path / "other", *start, "--le_length", 3))


def test_a_part_that_is_trained_on_keeps_its_settings_unless_they_are_given(workplace, tmp_path):
    flags = ["--max_steps", 1, "--reduce_threshold", 0.2, "--anchor_positions", "tl"]
    train(command_line(workplace, tmp_path / "one", *flags))
    flags = ["--max_steps", 1, "--load_new_modules", tmp_path / "one", "--min_remain_num", 3]
    train(command_line(workplace, tmp_path / "two", *flags))
    config = json.loads((tmp_path / "two/config.json").read_text())
    wanted = {"reduce_threshold": 0.2, "anchor_positions": ["tl"], "min_remain_num": 3}
    assert {name: config[name] for name in wanted} == wanted


def test_a_result_in_another_layout_leaves_nothing_of_the_one_before_it(workplace, tmp_path):
    flags = ["--max_steps", 1, "--overwrite_output_dir", True]
    for layout in ("ours", "released", "ours"):
        flags = [*flags, "--save_layout", layout, "--learning_rate", 1e-3 * (1 + len(flags))]
        trainer = train(command_line(workplace, tmp_path, *flags))
        _, weights = read_part(str(tmp_path), WEIGHTS_FILES)
        for name, value in trainer.part.state_dict().items():
            assert torch.equal(weights[name], value), (layout, name)
    for other in ("{}", ""):  # of a folder of something else, or damaged, nothing is removed
        (tmp_path / "config.json").write_text(other)
        remove_result(str(tmp_path))
        assert (tmp_path / "model.safetensors").is_file()


def test_every_sample_that_is_evaluated_counts_once(workplace, tmp_path):
    flags = ["--eval_dataset", workplace / "boxes.jsonl", "--evaluation_strategy", "steps"]
    flags += ["--eval_steps", 1, "--max_steps", 1, "--per_device_eval_batch_size", 3]  # 3, 3, 2
    trainer = train(command_line(workplace, tmp_path, *flags))
    judged = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    parts = judged["eval_le_loss"] + judged["eval_loc_loss"]
    assert judged["eval_loss"] == pytest.approx(parts, abs=2e-4)
    assert judged["eval_loc_loss"] == pytest.approx(
        judged["eval_dice_loss"] + 0.1 * judged["eval_bce_loss"], abs=2e-4
    )


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(workplace, tmp_path):
    # Two of four samples on each of two processes are the batch of one process.
    flags = ["--max_steps", 3, "--le_dropout_prob", 0, "--le_weight", 0, "--learning_rate", 1e-3]
    rows = (workplace / "boxes.jsonl").read_text().splitlines()
    (tmp_path / "held_out.jsonl").write_text("\n".join(rows[:5]))  # one process lacks samples
    flags += ["--eval_dataset", tmp_path / "held_out.jsonl", "--evaluation_strategy", "steps"]
    flags += ["--eval_steps", 3, "--per_device_eval_batch_size", 2]
    one = train(command_line(workplace, tmp_path / "one", *flags))
    words = command_line(workplace, tmp_path / "two", *flags, "--ddp_backend", "gloo")
    words += ["--per_device_train_batch_size", "2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--master_port", str(free_port()), "-m", "llava.train.train_glimpseprune"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost"}
    subprocess.run([*launcher, *words], check=True, timeout=1800, cwd=ROOT, env=environment)
    for name, value in read_part(str(tmp_path / "two"))[1].items():
        torch.testing.assert_close(value, one.part.state_dict()[name], atol=2e-5, rtol=1e-3)
    log = json.loads((tmp_path / "two/trainer_state.json").read_text())["log_history"]
    logs = (one.state.log_history, log)
    here, there = (next(entry for entry in log if "eval_loss" in entry) for log in logs)
    for name in ("eval_loss", "eval_bce_loss", "eval_iou"):
        assert there[name] == pytest.approx(here[name], abs=1e-3), name


def test_padding_changes_no_loss(workplace, tmp_path):
    trainer = train(command_line(workplace, tmp_path, "--max_steps", 1, "--le_dropout_prob", 0))
    objective = trainer.model.eval()
    assert isinstance(objective, GlimpseObjective)
    trainer.train_dataset.samples[1].question = "What is on the right? Tell me all about it."
    trainer.train_dataset.samples[1].answer = "A very long answer."
    items = [trainer.train_dataset[i] for i in range(2)]
    both = objective(**trainer.data_collator(items))
    alone = [objective(**trainer.data_collator([item])) for item in items]
    for name in ("loc_loss", "dice_loss", "bce_loss"):
        mean = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(both[name], mean, atol=1e-5, rtol=1e-5)
    counts = [int((item["labels"] >= 0).sum()) for item in items]
    mean = sum(out["le_loss"] * n for out, n in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(both["le_loss"], mean, atol=1e-5, rtol=1e-5)


def test_models_that_cut_images_into_tiles_are_refused(workplace, tmp_path):
    folder = tmp_path / "llava"
    shutil.copytree(workplace / "llava", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[84, 168]]}
    config["mm_vision_tower"] = str(workplace / "tower")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="take a LLaVA-1.5 or Qwen2.5-VL model"):
        train([*command_line(workplace, tmp_path / "out"), "--model_name_or_path", str(folder)])


# --- the recipe -----------------------------------------------------------------------------------


def test_flags_come_from_a_yaml_file_and_the_command_line_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("GLIMPSE_TEST", "0")
    values = {"seed": 3, "le_layers": [0, 1], "reduce_layer": None, "env": {"GLIMPSE_TEST": 7}}
    (tmp_path / "a.yaml").write_text(yaml.dump(values))
    words = with_config(["--config", str(tmp_path / "a.yaml"), "--seed", "4"])
    assert words[-2:] == ["--seed", "4"]
    assert with_config([f"--config={tmp_path / 'a.yaml'}", "--seed", "4"]) == words
    assert words[words.index("--le_layers") + 1 :][:2] == ["0", "1"]
    assert "--reduce_layer" not in words and os.environ["GLIMPSE_TEST"] == "7"


@needs_bash
def test_the_recipe_has_known_flags_and_the_values_of_the_paper(monkeypatch):
    recipe = words_of("v1_5/train_glimpse.sh", "--max_steps", 7, MODEL="my/model")
    ((program, *words),) = recipe
    assert program == "llava.train.train_glimpseprune"
    monkeypatch.chdir(ROOT)
    words = with_config(words)
    known = {
        name
        for cls in (GlimpseArguments, BoxArguments, GlimpseTrainingArguments)
        for name in cls.__dataclass_fields__
    }
    flags = {word.removeprefix("--") for word in words if word.startswith("--")}
    assert flags <= known
    assert words[words.index("--model_name_or_path") + 1] == "my/model"
    values = {"--learning_rate": "0.0001", "--loc_bce_weight": "0.1", "--attn_fuse_size": "256"}
    assert all(words[words.index(flag) + 1] == value for flag, value in values.items())
    data = yaml.safe_load((ROOT / "scripts/v1_5/train_glimpse_data.yaml").read_text())
    assert data["datasets"][0]["sampling_strategy"] == "random:20000"
