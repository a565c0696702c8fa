"""The glimpse of the playground's Qwen2.5-VL: its stage learns, goes on, and leaves a part."""

import json
from argparse import Namespace

import pytest
import torch

from llava import playground
from llava.model.builder import load_pretrained_model
from llava.pruning import build_pruner
from llava.train.glimpse.arguments import GlimpseArguments
from llava.train.glimpse.data import BoxSample
from playground import qwen_files, qwen_glimpse, qwen_model, qwen_tower, train_qwen

GRIDS = ((16, 16), (14, 20), (20, 14), (16, 18))


@pytest.fixture
def args(tmp_path, monkeypatch):
    """A checkpoint of two layers and a tower of two that sees pictures as they are, two steps."""
    torch.manual_seed(0)
    decoder = qwen_model.QwenDecoder(layers=2)
    qwen_model.read_places(decoder)
    sizes = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    config = qwen_tower.vision_config(**sizes, fullatt_block_indexes=(1,))
    monkeypatch.setattr(qwen_files, "MIN_PIXELS", 56 * 56)
    folder = tmp_path / "model"
    train_qwen.write(decoder, qwen_tower.TrainedTower(config).visual, folder)
    shape = GlimpseArguments(
        selected_layers=[0, 1],
        selected_visual_layers=[1, 0],
        attn_fuse_size=16,
        visual_cond_size=16,
    )
    monkeypatch.setattr(qwen_glimpse, "SHAPE", shape)
    monkeypatch.setattr(qwen_glimpse, "LARGE_GRIDS", GRIDS)
    return Namespace(output=folder, state=tmp_path / "state", minutes=None, log_every=1)


def test_the_stage_learns_from_new_pictures_of_any_shape(args):
    stage = qwen_glimpse.Glimpse(args)
    found = stage.loss(1)
    found["loss"].backward()
    assert all(p.grad is not None for p in stage.trained.parameters())
    assert set(stage.scores()) == {"precision", "recall", "f1", "iou", "le_loss", "loc_loss"}
    assert stage.trained.training


def test_answers_are_those_that_the_checkpoint_gives(args):
    stage, read = qwen_glimpse.Glimpse(args), qwen_files.text_tokenizer()
    texts = stage.texts(BoxSample("Is it?", "Yes", "", [[0, 0, 1, 1]]))
    assert torch.equal(texts["answer"], texts["labels"])
    *answer, end = texts["answer"].tolist()
    assert answer == qwen_files.encode(" Yes") and end == read.token_to_id("<|im_end|>")


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_a_run_is_bounded_by_the_clock_goes_on_and_leaves_a_part(args, monkeypatch):
    times = iter([0.0, 0.0, 1.0, *[1e9] * 50])
    monkeypatch.setattr(train_qwen.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(qwen_glimpse.Glimpse, "scores", lambda self: {"iou": 0.5})
    args.minutes = 1
    train_qwen.glimpse(args)
    log = [json.loads(line) for line in open(args.state / "glimpse_log.jsonl")]
    assert log[-1]["step"] == 1 and "loss" in log[0]
    state = torch.load(args.state / "glimpse_state.pt", weights_only=True)
    assert state["step"] == 1

    folder = args.output.parent / "glimpseprune-model"
    pruner = build_pruner("glimpseprune", new_modules=str(folder))
    _, model, _, _ = load_pretrained_model(
        str(args.output), None, "", device="cpu", torch_dtype=torch.float32, pruner=pruner
    )
    for name, value in model.pruner.module.state_dict().items():
        assert torch.equal(value, state["trained"][name].bfloat16().float()), name


def test_each_checkpoint_of_the_playground_has_parts_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(playground, "ROOT", tmp_path)
    for name in ("x-playground", "x-qwen2.5-vl-playground", "llava-v1.5-playground"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    folder = tmp_path / "checkpoints"
    found = [
        playground.trained_part("x", str(folder / f"{name}-playground"))
        for name in ("llava-v1.5", "qwen2.5-vl", "other")
    ]
    parts = [str(folder / "x-playground"), str(folder / "x-qwen2.5-vl-playground"), None]
    assert found == parts


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("qwen2.5-vl-playground", "qwen2.5-vl-plus-playground"),
        ("mine", "mine-plus"),
        ("playground", "playground-plus"),
    ],
)
def test_an_adapter_never_lies_in_the_folder_of_its_checkpoint(name, adapter, tmp_path):
    assert qwen_glimpse.plus_folder(tmp_path / name) == tmp_path / adapter
