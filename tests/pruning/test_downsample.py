"""Downsample: what reaches the tower, and where its tokens stand."""

import pytest
import torch

from llava.pruning import build_pruner, trace_pruning
from llava.pruning.ops import middle_places
from llava.pruning.testing import tiny


@pytest.mark.parametrize("budget, crops, side", [(64, 1, 8), (128, 1, 11), (640, 5, 11), (3, 1, 1)])
def test_the_largest_square_within_the_budget_is_used(budget, crops, side):
    pruner = build_pruner("downsample", visual_token_num=budget)
    images = torch.zeros(2, 3, 336, 336)
    assert pruner.before_tower(images, 14, crops).shape == (2, 3, side * 14, side * 14)
    assert pruner.token_schedule(576, 2, crops) == [side * side * crops] * 2


def test_a_uniform_image_stays_uniform():
    pruner = build_pruner("downsample", visual_token_num=9)
    small = pruner.before_tower(torch.full((1, 3, 84, 84), 0.7), 14)
    torch.testing.assert_close(small, torch.full((1, 3, 42, 42), 0.7))


def test_half_precision_stays_half_precision():
    pruner = build_pruner("downsample", visual_token_num=9)
    assert pruner.before_tower(torch.zeros(1, 3, 84, 84).bfloat16(), 14).dtype == torch.bfloat16


def test_a_tower_of_several_scales_is_refused_when_it_is_assigned(make_model):
    model = make_model(s2=True, s2_scales="84,168", mm_hidden_size=48)
    with pytest.raises(ValueError, match="smaller images, which the multi-scale tower does not"):
        model.pruner = build_pruner("downsample", visual_token_num=9)


def test_middle_places_of_equal_parts():
    assert middle_places(3, 6).tolist() == [1, 3, 5]
    assert middle_places(6, 6).tolist() == list(range(6))
    assert middle_places(2, 3).tolist() == [0, 2]


def test_tokens_stand_in_the_full_grid(model, sample):
    model.pruner = build_pruner("downsample", visual_token_num=9)
    prompt = sample(4, "image", 5)
    with trace_pruning(model) as trace:
        model.build_prompt(prompt.ids, images=prompt.images)
    places = [6 * row + column for row in (1, 3, 5) for column in (1, 3, 5)]
    assert trace.visual_positions[0].tolist() == places


def test_a_grid_that_is_no_square_is_within_the_schedule(own_grids_model):
    """It may fill a budget of which a square uses less."""
    own_grids_model.pruner = pruner = build_pruner("downsample", visual_token_num=12)
    with trace_pruning(own_grids_model) as trace:
        ids = tiny.sample(4, "image", 5).ids
        own_grids_model.build_prompt(ids, images=[tiny.picture(6, 8)])
    assert len(trace.visual_positions[0]) == 12 <= pruner.token_schedule(48, 6)[0]


def test_the_tower_itself_has_less_to_do(model, sample):
    model.pruner = build_pruner("downsample", visual_token_num=9)
    sizes = []
    layer = model.get_vision_tower().vision_tower.vision_model.encoder.layers[0].layer_norm1
    handle = layer.register_forward_hook(lambda module, inputs, out: sizes.append(out.shape[1]))
    model.encode_images(sample("image").images)
    handle.remove()
    assert sizes == [10]
