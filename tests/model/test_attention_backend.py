"""The attention that was asked for is the one that runs, in every family."""

import sys
from types import ModuleType

import pytest
import torch

from llava.model.builder import load_pretrained_model
from tests.paths import GOLDEN


@pytest.mark.parametrize("name", ["tiny-llava-v1.5", "tiny-qwen2.5-vl-cut"])
@pytest.mark.parametrize("backend", ["eager", "sdpa", None])
def test_the_layers_have_the_attention_that_was_asked_for(name, backend):
    model = load_pretrained_model(
        str(GOLDEN / name), None, name, device="cpu", attn_implementation=backend
    )[1]
    used = {layer.self_attn.backend for layer in model.get_model().layers}
    assert used == {backend or "sdpa"} == {model.config._attn_implementation}


@pytest.mark.parametrize("dtype", [torch.float32, "float32", "auto"])
def test_flash_attention_in_float32_is_refused_before_weights_are_read(monkeypatch, dtype):
    """The package would say so with the first prompt."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    options = dict(device="cuda", use_flash_attn=True, torch_dtype=dtype)
    with pytest.raises(ValueError, match="float16 or bfloat16, not in float32: choose one"):
        load_pretrained_model(str(GOLDEN / "tiny-llava-v1.5"), None, "llava", **options)
