"""VisionZip on inputs small enough to check by hand."""

import pytest
import torch

from llava.pruning import build_pruner, trace_pruning
from llava.pruning.testing import tiny
from llava.pruning.visionzip import VisionZip, compress, visionzip


@pytest.mark.parametrize(
    "budget, dominant, contextual",
    [(64, 54, 10), (128, 108, 20), (192, 162, 30), (32, 27, 5), (7, 6, 1), (2, 1, 1), (1, 1, 0)],
)
def test_a_budget_is_27_dominant_tokens_for_5_contextual_ones(budget, dominant, contextual):
    patches, merged = VisionZip(visual_token_num=budget).counts(576, crops=1)
    assert (patches + 1, merged) == (dominant, contextual)


def test_a_contextual_token_is_its_target_plus_the_mean_of_what_resembles_it():
    features = torch.arange(1.0, 7.0).view(1, 6, 1)
    score = torch.tensor([[0.0, 9.0, 0, 0, 0, 0]])
    keys = torch.eye(2)[[0, 0, 1, 1, 0, 0]][None]
    # Patch 1 is dominant. Of 0 2 3 4 5, targets are 0 and 3 (step 2: places 0 and 2).
    patches, _, tokens = compress(features, score, keys, 1, 2)
    assert patches.tolist() == [[1]]
    # 4 and 5 resemble target 0, 2 resembles target 3.
    assert tokens.flatten().tolist() == [2.0, 1.0 + (5 + 6) / 2, 4.0 + 3.0]


def test_dominant_patches_stand_in_raster_order_and_ties_go_to_the_lower_patch():
    score = torch.tensor([[1.0, 3.0, 1.0, 2.0, 1.0]])
    patches, _, _ = compress(torch.zeros(1, 5, 2), score, torch.ones(1, 5, 2), 3, 1)
    assert patches.tolist() == [[0, 1, 3]]


@pytest.mark.parametrize(
    "dominant, contextual, total", [(20, 30, 36 + 1), (99, 5, 36 + 1), (4, 0, 4)]
)
def test_more_tokens_than_patches_are_cut_to_what_there_is(dominant, contextual, total):
    pruner = VisionZip(dominant=dominant, contextual=contextual)
    assert pruner.token_schedule(36, 2) == [total] * 2


def test_the_sequence_is_class_token_then_patches_then_merged_tokens(model, sample):
    prompt = sample(4, "image", 5)
    with trace_pruning(visionzip(model, dominant=4, contextual=3), embeds=True) as trace:
        model.build_prompt(prompt.ids, images=prompt.images)
    patches = trace.visual_positions[0].tolist()
    assert patches[0] == -1 and patches[4:] == [-1] * 3
    assert patches[1:4] == sorted(patches[1:4]) and patches[1] >= 0
    tower = model.get_vision_tower()
    hidden = tower.tokens(prompt.images, frozenset({"cls_token"})).cls_token
    torch.testing.assert_close(trace.visual_embeds[0][:1], model.model.mm_projector(hidden)[0])


def test_tiles_are_read_as_one_grid_then_their_class_and_merged_tokens_follow(anyres_model, sample):
    anyres_model.pruner = build_pruner("visionzip", dominant=4, contextual=2)
    prompt = sample(4, "image", 5)
    images = [torch.randn(3, 3, 84, 84, generator=torch.Generator().manual_seed(5))]
    with trace_pruning(anyres_model) as trace:
        anyres_model.build_prompt(prompt.ids, images=images, image_sizes=[(42, 84)])
    patches = trace.visual_positions[0].tolist()
    assert len(patches) == 3 * 6
    assert patches[0] == -1 and patches[4:6] == [-1, -1]  # the overview keeps its own order
    assert patches[12:] == [-1] * 6
    assert patches[6:12] == sorted(patches[6:12])  # tiles on top of each other: tile after tile


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dominant": 5}, "go together"),
        ({"dominant": 0, "contextual": 3}, "at least 1"),
        ({"dominant": 3, "contextual": -1}, "at least 0"),
    ],
)
def test_impossible_counts_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        build_pruner("visionzip", **options)


def test_a_tower_without_a_class_token_keeps_none_of_it(own_grids_model):
    own_grids_model.pruner = pruner = build_pruner("visionzip", dominant=2, contextual=1)
    for grid in ((1, 2), (2, 3)):
        with trace_pruning(own_grids_model) as trace:
            ids = tiny.sample(4, "image", 5).ids
            own_grids_model.build_prompt(ids, images=[tiny.picture(*grid)])
        kept = len(trace.visual_positions[0])
        assert pruner.token_schedule(grid[0] * grid[1], 6) == [kept] * 6
