"""The vision tower against transformers' own forward pass."""

from types import SimpleNamespace

import pytest
import torch

from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.pruning import Pruner, VisionStage
from llava.pruning.tokens import VisionTokens


@pytest.fixture
def tower(model):
    return model.get_vision_tower()


@pytest.fixture
def images():
    return torch.randn(2, 3, 84, 84, generator=torch.Generator().manual_seed(0))


def reference(tower, images):
    return tower.vision_tower(images, output_hidden_states=True, output_attentions=True)


@pytest.mark.parametrize("layer", [-1, -2, -3, 1])
def test_features_are_those_of_the_selected_layer(tower, images, layer):
    expected = reference(tower, images).hidden_states[layer][:, 1:]
    tower.select_layer, kept = layer, tower.select_layer
    got = tower(images)
    tower.select_layer = kept
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_extras_are_the_row_and_keys_of_the_selected_layer(tower, images):
    out = reference(tower, images)
    vision = tower.tokens(images, frozenset({"cls_attention", "keys", "salience"}))
    torch.testing.assert_close(vision.salience, vision.cls_attention.mean(dim=1))
    expected = out.attentions[-2][:, :, 0, 1:]
    torch.testing.assert_close(vision.cls_attention, expected, atol=1e-6, rtol=1e-4)
    layer = tower.vision_tower.vision_model.encoder.layers[-2]
    keys = layer.self_attn.k_proj(layer.layer_norm1(out.hidden_states[-3]))[:, 1:]
    torch.testing.assert_close(vision.keys, keys, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layers", [(1, 2), (2, 3), (3,)])
def test_the_mean_of_outputs_stands_at_the_last_layer_it_is_asked_of(tower, images, layers):
    """Layers behind that of the features run for it."""
    stage = VisionStage()
    stage.tower_extras = lambda *_: dict.fromkeys(layers, frozenset({"output_mean"}))
    vision = tower.tokens(images, stage=stage)
    states = reference(tower, images).hidden_states
    expected = torch.stack([states[layer + 1][:, 1:] for layer in layers]).mean(dim=0)
    torch.testing.assert_close(
        vision.layers[layers[-1]]["output_mean"], expected, atol=1e-5, rtol=1e-4
    )
    assert "output_mean" not in vision.layers[layers[0]] or len(layers) == 1


def test_only_what_was_asked_for_comes_back(tower, images):
    vision = tower.tokens(images)
    assert vision.cls_attention is None and vision.keys is None and vision.fingerprint is None
    with pytest.raises(ValueError, match="choose from"):
        tower.tokens(images, frozenset({"gradients"}))


def test_layers_nobody_reads_do_not_run(tower, images):
    ran = []
    layers = tower.vision_tower.vision_model.encoder.layers
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(layers)
    ]
    tower(images)
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 2]  # of four: hidden_states[-2] is the output of the third


def test_the_fingerprint_depends_on_the_pixels_alone(tower, images):
    needs = frozenset({"fingerprint"})
    both = tower.tokens(images, needs).fingerprint
    assert tower.tokens(images[1:], needs).fingerprint == both[1]
    assert both[0] != both[1]


def test_keeping_tokens_takes_everything_along():
    vision = VisionTokens(
        features=torch.arange(8.0).view(1, 4, 2),
        positions=torch.arange(4)[None],
        grid=(2, 2),
        cls_attention=torch.arange(4.0).view(1, 1, 4),
    )
    kept = vision.keep(torch.tensor([[1, 3]]))
    assert kept.features.tolist() == [[[2, 3], [6, 7]]]
    assert kept.positions.tolist() == [[1, 3]]
    assert kept.cls_attention.tolist() == [[[1, 3]]]


def test_the_multi_scale_tower_refuses_methods_inside_it(tower_dir, images):
    config = SimpleNamespace(
        mm_vision_tower=str(tower_dir), mm_vision_select_layer=-2, s2=True, s2_scales="42,84"
    )
    tower = build_vision_tower(config)

    class Inside(VisionStage, Pruner):
        def before_tower_layer(self, index, tokens):
            return tokens

    assert tower.tokens(images, stage=Pruner().vision).features.shape[0] == 2
    with pytest.raises(
        ValueError, match="'tower_tokens'.* which the multi-scale tower does not pr"
    ):
        tower.tokens(images, stage=Inside())


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, None])
def test_weights_are_read_late_to_wherever_a_loader_says(tower_dir, images, device_map):
    """`tower.load_model(device_map=device_map)` stands in copies of LLaVA's loader."""
    config = SimpleNamespace(mm_vision_tower=str(tower_dir), mm_vision_select_layer=-2)
    late = build_vision_tower(config, delay_load=True)
    late.load_model(device_map=device_map)
    late.to(images.device)
    assert late.is_loaded and torch.equal(late(images), build_vision_tower(config)(images))
