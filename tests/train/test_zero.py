"""What training on several processes rests on, piece by piece, in one process."""

import importlib.util
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.model import LlavaLlamaForCausalLM
from llava.train.arguments import TrainingArguments
from llava.train.optimizer import parameter_groups
from llava.train.run import check_trainer_flags, own_precision
from llava.train.saving import check_written, save_full
from llava.train.zero import join_processes, settle_sizes
from tests.paths import ROOT
from tests.train.test_run import run, workplace  # noqa: F401
from tests.train.train_tools import write_start

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs DeepSpeed: pip install -e .[deepspeed]",
)


@pytest.fixture(autouse=True)
def own_environment():
    """Arguments of a training leave their mark in the environment."""
    with own_precision():
        yield


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A tiny LLaVA-NeXT in training mode, which has a newline embedding."""
    folder = tmp_path_factory.mktemp("zero")
    write_start(
        folder, "next", num_hidden_layers=2, image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad", image_grid_pinpoints=[[84, 168], [168, 84]],
    )  # fmt: skip
    model = LlavaLlamaForCausalLM.from_pretrained(folder / "next")
    model.get_vision_tower().load_model()
    return model.train()


def order_of_gradients(model, ids, images, sizes):
    """Loss, and the names of the parameters in the order in which their gradients are ready."""
    names, handles = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            note = lambda _, name=name: names.append(name)  # noqa: E731
            handles.append(parameter.register_post_accumulate_grad_hook(note))
    model.zero_grad()
    labels = ids.masked_fill(ids < 0, -100)
    loss = model(ids, labels=labels, images=images, image_sizes=sizes).loss
    loss.backward()
    for handle in handles:
        handle.remove()
    return loss, names


def test_a_text_gives_the_projector_gradients_of_zeros_in_the_order_of_an_image(llava):
    side = llava.get_vision_tower().image_size
    text, picture = torch.tensor([[1, 5, 9, 7]]), torch.tensor([[1, -200, 9, 7]])
    crops = torch.randn(3, 3, side, side)
    loss, order = order_of_gradients(llava, text, crops[:1] * 0, [(side, side)])
    for name, parameter in llava.get_model().named_parameters():
        if "mm_projector" in name or name == "image_newline":
            assert parameter.grad is not None and not parameter.grad.any(), name
    assert loss == llava(text, labels=text).loss  # the dummy changes nothing
    _, wanted = order_of_gradients(llava, picture, [crops], [(side, 2 * side)])
    assert llava.get_model().image_newline.grad.any()
    assert order == wanted and "model.mm_projector.0.weight" in wanted
    _, mixed = order_of_gradients(
        llava, torch.cat([text, picture]), [crops[0] * 0, crops], [(side, side), (side, 2 * side)]
    )
    assert mixed == wanted


def test_dummies_are_not_encoded_where_nothing_is_learned(llava, monkeypatch):
    monkeypatch.setattr(llava, "image_tokens", lambda *_: pytest.fail("a dummy was encoded"))
    side = llava.get_vision_tower().image_size
    text, dummy = torch.tensor([[1, 5, 9]]), torch.zeros(1, 3, side, side)
    llava.eval()
    try:
        assert llava(text, labels=text, images=dummy).loss == llava(text, labels=text).loss
        with pytest.raises(ValueError, match="1 images for 0 <image> marks"):
            llava(text, images=dummy)  # without labels this is a question, and a mistake
    finally:
        llava.train()


def test_no_group_of_the_optimizer_is_empty(workplace, tmp_path):  # noqa: F811
    flags = ["--lora_enable", True, "--lora_r", 4, "--max_steps", 1]
    for more in ([], ["--mm_projector_lr", 1e-3]):
        model = run(workplace, tmp_path / str(len(more)), *flags, *more).model
        groups = parameter_groups(model, 0.1, 1e-3 if more else None)
        assert len(groups) == (3 if more else 2)
        assert all(group["params"] for group in groups)
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for group in groups for p in group["params"]} == trained


def test_a_save_that_lacks_weights_is_noticed(llava, tmp_path):
    state = llava.state_dict()
    save_full(llava, str(tmp_path / "whole"), state)
    for name, broken in (
        ("gone", {}),
        ("lacking", {k: v for k, v in state.items() if "layers.1" not in k}),
        ("split", {**state, "model.norm.weight": torch.empty(0)}),
    ):
        with pytest.raises(ValueError, match="the weights were not collected from all processes"):
            save_full(llava, str(tmp_path / name), broken)
    file = tmp_path / "whole/model.safetensors"
    tensors = load_file(file)
    tensors.pop("lm_head.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of the model's .*lm_head.weight"):
        check_written(llava, str(tmp_path / "whole"), lambda name: "vision_tower." not in name)


@needs_deepspeed
@pytest.mark.parametrize("width", [256, 4096, 5120])
@pytest.mark.parametrize("zero", ["zero3", "zero3_offload"])
def test_sizes_that_follow_the_width_are_whole_numbers(tmp_path, width, zero):
    args = TrainingArguments(
        str(tmp_path), deepspeed=str(ROOT / f"scripts/{zero}.json"), use_cpu=True, report_to="none"
    )
    settle_sizes(args, width)
    sizes = args.hf_deepspeed_config.config["zero_optimization"]
    for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size"):
        assert type(sizes[key]) is int and sizes[key] > 0.89 * width**2
    assert sizes["stage3_param_persistence_threshold"] == 10 * width


@needs_deepspeed
@pytest.mark.parametrize("zero", ["zero3", "zero3_offload"])
@pytest.mark.parametrize("flag", ["mm_projector_lr", "mm_vision_tower_lr"])
def test_a_rate_that_a_deepspeed_file_leaves_unread_is_refused(tmp_path, caplog, flag, zero):
    file = str(ROOT / f"scripts/{zero}.json")
    options = dict(deepspeed=file, use_cpu=True, report_to="none", lr_scheduler_type="cosine")
    check_trainer_flags(TrainingArguments(str(tmp_path), **options))
    told = "WarmupLR, takes the place of --lr_scheduler_type cosine" in caplog.text
    assert told == (zero == "zero3_offload")
    args = TrainingArguments(str(tmp_path), **options, **{flag: 1e-5})
    if zero == "zero3":
        return check_trainer_flags(args)
    with pytest.raises(ValueError, match=f"--{flag} 1e-05: the optimizer of .* has one learning"):
        check_trainer_flags(args)


@needs_deepspeed
def test_deepspeed_without_a_launcher_is_explained(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    args = TrainingArguments(
        str(tmp_path), deepspeed=str(ROOT / "scripts/zero2.json"), use_cpu=True, report_to="none"
    )
    with pytest.raises(ValueError, match="needs a launcher, also for one process"):
        join_processes(args)
    assert "RANK" not in os.environ


def test_fsdp_refuses_what_it_cannot_train(workplace, tmp_path):  # noqa: F811
    before = dict(os.environ)
    for flag in ("--lora_enable", "--tune_mm_mlp_adapter"):
        with pytest.raises(ValueError, match="--fsdp trains whole models only"):
            run(workplace, tmp_path, flag, True, "--fsdp", "full_shard auto_wrap")
    assert os.environ == before  # the next run in this process is one without FSDP
