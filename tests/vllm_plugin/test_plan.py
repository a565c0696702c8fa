"""Pruning inside vLLM, without vLLM: which methods may, and what they make of images.

The tower stands in for vLLM's, whose layers have queries, keys and values in one product.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from llava.pruning import build_pruner
from llava.vllm_plugin import CLASSES, register
from llava.vllm_plugin.plan import check_unpruned, plan_of, prune
from llava.vllm_plugin.tower import TowerShape, tower_tokens
from tests.model.checkpoint_tools import CHECKPOINT, load

SHAPE = TowerShape((24, 22), (24, 24), 64, 4)
FIXED = ("divprune", "fastervlm", "hiprune", "holov", "idpruner", "pool", "random", "scope")
FIXED += ("visionzip", "vispruner")


@pytest.fixture(scope="module")
def model():
    return load(CHECKPOINT, torch_dtype=torch.float64)[1]


class Attention(nn.Module):
    """Attention of vLLM's tower, with the weights of transformers' own."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def qkv_proj(self, x):
        return torch.cat([self.own.q_proj(x), self.own.k_proj(x), self.own.v_proj(x)], -1), None


class Layer(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.own, self.self_attn, self.layer_norm1 = own, Attention(own.self_attn), own.layer_norm1

    def forward(self, x):
        return self.own(x, None, None)[0]


def stand_in(model):
    """vLLM's tower: it has no layer behind that of the features."""
    tower, own = model.get_vision_tower(), model.get_vision_tower().vision_tower.vision_model
    layers = [Layer(layer) for layer in own.encoder.layers[: tower.num_run_layers]]
    encoder = SimpleNamespace(layers=layers)
    parts = {"embeddings": own.embeddings, "pre_layrnorm": own.pre_layrnorm, "encoder": encoder}
    return SimpleNamespace(**parts)


def config_of(model, **changes):
    """The config as it is in the layout of transformers."""
    vision = model.get_vision_tower().config
    values = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", **changes}
    return SimpleNamespace(vision_config=vision, **values)


@pytest.mark.parametrize("method", FIXED)
def test_images_are_pruned_as_by_our_own_model(model, method):
    shape = TowerShape.of(config_of(model))
    plan = plan_of({"method": method, "visual_token_num": 64}, shape, 4)
    side = model.get_vision_tower().image_size
    pixels = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0)).double()
    model.pruner = build_pruner(method, visual_token_num=64)
    with torch.no_grad():
        expected = [image.embeds for image in model.image_tokens(pixels)]
        vision = tower_tokens(stand_in(model), pixels, shape, plan.pruner.vision)
        found = prune(plan.pruner, vision, model.get_model().mm_projector)
    assert [len(image) for image in found] == [plan.count] * 3 == [64] * 3
    for own, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", FIXED)
def test_a_share_of_the_tokens_is_a_number_before_an_image_is_seen(method):
    values = {"method": method, "visual_token_ratio": 0.25}
    assert plan_of(values, SHAPE, 32).count == 144


@pytest.mark.parametrize("values", [None, {"method": "none"}])
def test_nothing_is_pruned_unless_a_method_is_named(values):
    assert plan_of(values, SHAPE, 32) is None


@pytest.mark.parametrize(
    "method, says",
    [
        ("fastv", "fastv acts inside the decoder, which runs in a server"),
        ("glimpseprune", "acts inside the decoder"),
        ("nuwa", "acts inside the decoder"),
        ("vispruner+fastv", "acts inside the decoder"),
        ("cdpruner", "reads the question, which vLLM's encoder is not given"),
        ("downsample", "changes images before the tower"),
        ("prumerge", "asks layer 23 of the tower, but vLLM loads none behind layer 22"),
    ],
)
def test_a_method_that_cannot_work_in_a_server_says_why(method, says):
    with pytest.raises(ValueError, match=says):
        plan_of({"method": method}, SHAPE, 32)


def test_a_budget_that_depends_on_the_image_is_refused():
    shape = TowerShape((24, 23), (24, 24), 64, 4)
    with pytest.raises(ValueError, match=r"keeps \d+ to \d+ tokens, as an image needs them"):
        plan_of({"method": "prumerge"}, shape, 32)


@pytest.mark.parametrize(
    "values, says",
    [
        (
            "vispruner",
            'pruning must look like {"method": NAME, "visual_token_num": 64}, not',
        ),
        ({"visual_token_num": 64}, "pruning must look like"),
        ({"method": "vispruna"}, "vispruner"),
        ({"method": "vispruner", "visual_token_num": 577}, "577"),
        ({"method": "vispruner", "colour": 1}, "colour"),
    ],
)
def test_a_mistake_in_the_override_is_named(values, says):
    with pytest.raises(ValueError, match=says):
        plan_of(values, SHAPE, 32)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"vision_feature_layer": [-2, -5]}, "needs one vision_feature_layer"),
        ({"vision_config": SimpleNamespace(num_hidden_layers=4, model_type="siglip")}, "a siglip"),
    ],
)
def test_a_tower_that_methods_do_not_know_is_refused(model, changes, says):
    with pytest.raises(ValueError, match=says):
        TowerShape.of(SimpleNamespace(**{**vars(config_of(model)), **changes}))


def test_patches_with_the_class_token_among_them_are_refused(model):
    shape = TowerShape.of(config_of(model, vision_feature_select_strategy="full"))
    with pytest.raises(ValueError, match="cls_patch"):
        plan_of({"method": "vispruner", "visual_token_num": 64}, shape, 4)


def test_vllm_is_given_the_classes_by_name_alone(monkeypatch):
    """So that a process which serves another model imports nothing of it."""
    given, module = {}, ModuleType("vllm")
    module.ModelRegistry = SimpleNamespace(register_model=given.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", module)
    register()
    assert given == CLASSES and "LlavaForConditionalGeneration" in given
    assert not [name for name in sys.modules if name.startswith("llava.vllm_plugin.model")]


def test_a_model_that_is_never_pruned_refuses_the_override():
    config = SimpleNamespace(model_type="llava_next")
    check_unpruned(config)
    config.pruning = {"method": "vispruner"}
    with pytest.raises(ValueError, match=r"prunes LLaVA-1.5 alone, and this model is llava_next"):
        check_unpruned(config)
