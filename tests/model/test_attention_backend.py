"""The attention that was asked for is the one that runs, in every family."""

import pytest

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
