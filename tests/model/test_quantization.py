"""Which layers are quantised, with a stand-in for bitsandbytes that rounds to a few bits."""

from __future__ import annotations

import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from llava.eval.efficiency.random_model import build_random_model, shapes
from llava.model import placement
from llava.model.export import export
from llava.model.quantization import quantize
from llava.pruning import build_pruner
from tests.model.checkpoint_tools import load
from tests.model.test_qwen2_5_vl_loading import answer
from tests.paths import GOLDEN

QWEN, LLAVA = GOLDEN / "tiny-qwen2.5-vl-cut", GOLDEN / "tiny-llava-v1.5"
OPTIONS = {"load_8bit": 8, "load_4bit": 4}
#: linear layers of a decoder layer
NAMES = {f"self_attn.{name}_proj" for name in "qkvo"} | {
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
}


class Rounded(nn.Linear):
    """bits: of its weights, packed when the model is moved, as those of bitsandbytes are"""

    def __init__(self, inputs, outputs, bias, bits, device):
        super().__init__(inputs, outputs, bias, device=device)
        self.bits = bits

    def _apply(self, fn, recurse=True):
        scale = self.weight.data.abs().amax() / 2 ** (self.bits - 1)
        self.weight.data = (self.weight.data / scale).round() * scale
        return super()._apply(fn, recurse)


@pytest.fixture
def packed(monkeypatch):
    """Puts the stand-in in place of the package."""
    module = ModuleType("bitsandbytes")

    def params(data, requires_grad, **_):
        return nn.Parameter(data, requires_grad)

    def linear(bits):
        def make(inputs, outputs, bias, device, **_):
            return Rounded(inputs, outputs, bias, bits, device)

        return make

    module.nn = SimpleNamespace(
        Linear4bit=linear(4), Linear8bitLt=linear(8), Params4bit=params, Int8Params=params
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)


@pytest.fixture(scope="module")
def llava_hf(tmp_path_factory):
    """LLaVA in the layout of transformers."""
    folder = tmp_path_factory.mktemp("layout") / "llava-hf"
    export(str(LLAVA), str(folder), "llava-hf")
    return folder


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava", "llava-hf"])
def test_the_decoder_s_linear_layers_are_quantised_and_nothing_else(
    packed, llava_hf, family, option
):
    checkpoint = {"qwen2.5-vl": QWEN, "llava": LLAVA, "llava-hf": llava_hf}[family]
    model = load(checkpoint, name="llava", **{option: True})[1]
    found = {n: m for n, m in model.named_modules() if isinstance(m, Rounded)}
    layers = range(model.config.num_hidden_layers)
    assert found.keys() == {f"model.layers.{n}.{name}" for n in layers for name in NAMES}
    assert {layer.bits for layer in found.values()} == {OPTIONS[option]}
    assert not any(p.device.type == "meta" for p in model.parameters())


def test_biases_and_the_tied_head_stay_as_they_are(packed):
    plain, model = load(QWEN)[1], load(QWEN, load_8bit=True)[1]
    assert model.dtype != torch.float16  # values of this family leave its range
    before, after = (m.model.layers[0].self_attn.q_proj for m in (plain, model))
    torch.testing.assert_close(after.bias.float(), before.bias, atol=0, rtol=1e-2)
    assert after.bias.abs().sum() > 0
    assert len(after.weight.unique()) < 300 < len(before.weight.unique())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, weight in plain.visual.state_dict().items():
        torch.testing.assert_close(
            model.visual.state_dict()[name].float(), weight, atol=0, rtol=1e-2
        )


@pytest.mark.parametrize("option", OPTIONS)
def test_both_layouts_of_llava_are_quantised_alike(packed, llava_hf, option):
    options = {"torch_dtype": torch.float32, option: True}
    ours, theirs = (load(folder, **options)[1].state_dict() for folder in (LLAVA, llava_hf))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():  # theirs has rows behind the vocabulary
        assert torch.equal(weight, theirs[name][: len(weight)] if weight.dim() else theirs[name])


@pytest.mark.parametrize("option", OPTIONS)
def test_a_quantised_model_answers_and_prunes(packed, option):
    tokenizer, model, processor, _ = load(QWEN, torch_dtype=torch.float32, **{option: True})
    processor.max_pixels = 64 * 28 * 28
    dense = answer(tokenizer, model, processor)

    model.pruner = build_pruner("divprune", visual_token_ratio=0.222)
    assert len(answer(tokenizer, model, processor)) == len(dense) == 8


@pytest.mark.parametrize("bits", OPTIONS.values())
def test_packed_weights_need_less_room_on_several_gpus(packed, monkeypatch, bits):
    """Two of them, with room for a third of the unpacked model each, leave nothing to the CPU."""
    config, tower = shapes(str(QWEN), layers=24)
    config.intermediate_size = 512
    model, asked = build_random_model(config, tower), []
    names = quantize(model, bits, torch.float32)
    assert len(names) == 24 * len(NAMES) and names.keys() < dict(model.named_parameters()).keys()
    whole = sum(p.nbytes for p in model.parameters())
    room = {0: whole // 3, 1: whole // 3, "cpu": whole}
    monkeypatch.setattr(placement, "get_balanced_memory", lambda model, **_: dict(room))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * whole // 3, whole))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(placement, "dispatch_model", lambda model, where: asked.append(where))
    for known in ({}, names):
        placement.place(model, "balanced", torch.device("cuda"), known)
    assert ["cpu" in where.values() for where in asked] == [True, False]
    fits = [placement._fits(model, torch.device("cuda"), known) for known in ({}, names)]
    assert fits == [False, True]


@pytest.mark.parametrize("option", OPTIONS)
def test_without_the_package_the_extra_is_named_before_weights_are_read(monkeypatch, option):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"\[quant\]"):
        load(QWEN, **{option: True})


@pytest.mark.parametrize(
    ("option", "dtype"), [("load_8bit", torch.int8), ("load_4bit", torch.uint8)]
)
def test_the_package_itself_packs_the_weights_of_llava_hf(llava_hf, option, dtype):
    pytest.importorskip("bitsandbytes")
    model = load(llava_hf, **{option: True})[1]
    assert model.model.layers[1].self_attn.q_proj.weight.dtype == dtype
    assert model.get_vision_tower().dtype == model.dtype == model.lm_head.weight.dtype


@pytest.mark.parametrize(
    ("option", "dtype"), [("load_8bit", torch.int8), ("load_4bit", torch.uint8)]
)
def test_the_package_itself_packs_the_weights(tmp_path, option, dtype):
    """Where it is installed; its kernels for 4 bits on the CPU want multiples of 64."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "model"
    shutil.copytree(QWEN, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config, _ = shapes(str(QWEN), layers=2)
    config.intermediate_size = 128
    build_random_model(config).save_pretrained(folder)
    tokenizer, model, processor, _ = load(folder, **{option: True})
    processor.max_pixels = 64 * 28 * 28
    assert model.model.layers[1].self_attn.q_proj.weight.dtype == dtype
    assert model.visual.blocks[0].attn.qkv.weight.dtype == model.dtype
    model.pruner = build_pruner("fastv", visual_token_ratio=0.222)
    assert len(answer(tokenizer, model, processor)) == 8
