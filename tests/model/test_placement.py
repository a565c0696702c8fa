"""The default dtype: what the device, and the kind of CPU, is fast at."""

import json
import os
import subprocess
import sys

import pytest
import torch

from llava.log_output import say
from llava.model import placement
from llava.model.builder import load_pretrained_model
from llava.model.placement import choose_dtype, cpu_multiplies_bfloat16, dtype_note, fast_dtype
from llava.playground import default_model_path

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP16, FP32 = ({"torch_dtype": name} for name in ("bfloat16", "float16", "float32"))


@pytest.fixture(params=[True, False], ids=["native bf16", "no bf16"])
def native(request, monkeypatch):
    """Whether the pretended CPU has bf16 instructions."""
    monkeypatch.setattr(placement, "cpu_multiplies_bfloat16", lambda: request.param)
    return request.param


def test_a_gpu_takes_half_precision_whatever_was_saved(native):
    assert {choose_dtype(None, config, CUDA) for config in (BF16, FP16, FP32)} == {torch.float16}


def test_a_cpu_takes_bfloat16_only_where_it_multiplies_it(native):
    assert choose_dtype(None, BF16, CPU) == (torch.bfloat16 if native else torch.float32)
    assert choose_dtype(None, FP16, CPU) == choose_dtype(None, FP32, CPU) == torch.float32
    assert fast_dtype("cpu") == (torch.bfloat16 if native else torch.float32)


def test_a_gpu_that_is_not_there_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert placement.choose_device("cuda:1") == torch.device("cuda", 1)
    assert placement.choose_device("cuda") == CUDA
    with pytest.raises(ValueError, match="'cuda:2' was asked for, but the last of 2 .* cuda:1"):
        placement.choose_device("cuda:2")
    with pytest.raises(ValueError, match="'cuda:2'"):
        placement.single_device(2, None)


@pytest.mark.parametrize("capability, dtype", [((9, 0), "bfloat16"), ((7, 5), "float16")])
def test_a_gpu_without_bfloat16_products_is_fast_at_float16(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fast_dtype("cuda") == getattr(torch, dtype)
    assert fast_dtype("mps") == torch.float16
    qwen = BF16 | {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}  # leaves float16
    for quantized in (True, False):
        assert choose_dtype(None, qwen, CUDA, quantized) == getattr(torch, dtype)


def test_what_is_asked_for_is_taken(native):
    assert choose_dtype("auto", BF16, CPU) == torch.bfloat16
    assert choose_dtype("auto", FP16, CPU) == torch.float16
    assert choose_dtype(torch.float64, {}, CPU) == torch.float64
    assert choose_dtype("bfloat16", FP32, CPU) == torch.bfloat16
    with pytest.raises(ValueError, match="choose float32"):
        choose_dtype("int3", {}, CPU)


def test_loading_says_once_which_dtype_this_cpu_gets(native, capsys):
    path = default_model_path()
    model = load_pretrained_model(path, None, "llava-v1.5", device="cpu")[1]
    assert model.dtype == model.get_vision_tower().dtype == fast_dtype("cpu")
    said = capsys.readouterr().err
    words = "Running in bfloat16, as saved" if native else "Running in float32: this CPU is slow at"
    assert said.count(words) == 1
    load_pretrained_model(path, None, "llava-v1.5", device="cpu", torch_dtype=torch.float32)
    assert "Running in" not in capsys.readouterr().err


def test_of_several_processes_the_first_says_what_was_decided(monkeypatch, capsys):
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("RANK", rank)
        say("a decision")
    assert capsys.readouterr().err == "a decision\n"


def test_nothing_is_said_where_the_cpu_decides_nothing():
    assert dtype_note(torch.float32, FP32, CPU) is None
    assert dtype_note(torch.float16, BF16, CUDA) is None


def test_a_cpu_kept_to_avx2_counts_as_one_without_bfloat16():
    code = (
        "from llava.model.placement import *; import json; "
        "print(json.dumps([cpu_multiplies_bfloat16(), str(fast_dtype('cpu'))]))"
    )
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert json.loads(out.stdout) == [False, "torch.float32"]


def test_bfloat16_counts_as_native_only_where_the_cpu_lists_the_instructions(monkeypatch):
    def asked(mkldnn: bool, found: dict) -> bool:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: mkldnn)
        return cpu_multiplies_bfloat16.__wrapped__()

    assert asked(True, {"avx512_bf16": True, "amx_bf16": False})
    assert asked(True, {"amx_bf16": True}) and asked(True, {"bf16": True})
    assert not asked(True, {"avx512_f": True, "avx512_bf16": False})  # oneDNN would imitate it
    assert not asked(False, {"avx512_bf16": True})  # oneDNN is kept from using it
