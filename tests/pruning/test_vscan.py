"""VScan on inputs small enough to check by hand."""

import pytest
import torch

from llava.pruning import VisionTokens, trace_pruning
from llava.pruning.vscan import VScan, absorb


def vision(local, best, grid, **extras):
    count = grid[0] * grid[1]
    row = torch.arange(count)[None]
    return VisionTokens(
        features=torch.eye(count)[None],
        positions=row,
        grid=grid,
        salience=torch.as_tensor(best, dtype=torch.float32)[None],
        layers={1: {"salience": torch.as_tensor(local, dtype=torch.float32)[None]}},
        **extras,
    )


def test_every_window_gets_its_share_and_the_deep_layer_the_rest():
    local = [1, 2, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 4]  # 4 x 4 patches, 2 x 2 windows
    best = [0, 9, 8, 7, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 5]
    pruner = VScan(window=2)
    tokens = vision(local, best, (4, 4))
    assert pruner.local_picks(tokens, 8)[0].nonzero()[:, 0].tolist() == [1, 6, 8, 15]
    # 1, 8 and 15 are taken: 2 and 3 come next, then the lowest places that are left
    assert pruner.select(tokens, 8)[0].tolist() == [0, 1, 2, 3, 4, 6, 8, 15]


def test_fewer_tokens_than_windows_leave_out_the_local_picks():
    pruner = VScan(window=1)
    tokens = vision([9, 0, 0, 0], [0, 0, 2, 1], (2, 2))
    assert not pruner.local_picks(tokens, 2).any()
    assert pruner.select(tokens, 2)[0].tolist() == [2]


@pytest.mark.parametrize(("wanted", "kept"), [(96, 96), (150, 139), (188, 174), (50, 41), (20, 10)])
def test_half_of_the_tokens_is_shared_out_in_whole_tokens_per_window(wanted, kept):
    assert VScan().num_selected(wanted, (24, 24)) == kept


def test_dropped_tokens_are_averaged_into_the_one_they_resemble():
    features = torch.tensor([[[2.0, 0.0], [4.0, 0.1], [0.0, 3.0], [0.0, 0.0]]])
    merged = absorb(features, torch.tensor([[0, 2]]))
    # 1 goes to 0; the zero vector resembles both alike and goes to the earlier one
    expected = torch.tensor([[[2.0, 0.1 / 3], [0.0, 3.0]]])
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize(
    ("budget", "before", "after"), [(64, 96, 32), (128, 192, 64), (192, 288, 96)]
)
def test_a_budget_is_the_average_over_the_layers(budget, before, after):
    schedule = VScan(visual_token_num=budget).token_schedule(576, 32)
    assert schedule == [before] * 16 + [after] * 16


def test_a_tiled_image_keeps_the_same_share_in_the_decoder():
    pruner = VScan(encoder_token_num=96, image_token_list=[32], layer_list=[16])
    schedule = pruner.image_schedule(270, 32, 576, budget=64)
    assert schedule == [270] * 16 + [90] * 16


def test_tiles_are_pruned_one_by_one_and_then_together(anyres_model, sample):
    anyres_model.pruner = VScan(visual_token_num=50)
    prompt = sample(4, "image", 5)
    pixels = [torch.randn(3, 3, 84, 84, generator=torch.Generator().manual_seed(5))]
    with trace_pruning(anyres_model) as trace:
        anyres_model.generate(
            prompt.ids, images=pixels, image_sizes=[(84, 168)], max_new_tokens=1, do_sample=False
        )
    seen = [int(n) for n in trace.visual_tokens]
    patches = trace.visual_positions[0]
    assert ((patches >= 0) & (patches < 36)).sum() == 15  # of the overview: 1.5 x 50 / 5
    assert seen[:3] == [len(patches)] * 3 and seen[3:] == [len(patches) * 5 // 15] * 3


@pytest.mark.parametrize(
    "options",
    [
        {"visual_token_num": 0},
        {"window": 0},
        {"layer_list": [8, 16]},
        {"image_token_list": [32, 16]},
    ],
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ValueError, match="must"):
        VScan(**options)


def test_impossible_settings_are_refused_when_assigned(model):
    for options in ({"encoder_token_num": 37}, {"layer_list": [6]}, {"local_layer": 3}):
        with pytest.raises(ValueError, match="exceeds|below|must be one of"):
            model.pruner = VScan(visual_token_num=10, **options)


@pytest.mark.parametrize(
    "options", [{"encoder_token_num": 192}, {"encoder_token_ratio": 0.6}, {"layer_list": [30]}]
)
def test_an_average_that_the_layers_before_the_cut_exceed_is_refused(options):
    with pytest.raises(ValueError, match=r"visual_token_num \(64\) is out of reach"):
        VScan(**options).check(576, 32)


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_token_num": 192, "encoder_token_ratio": 0.6},
        {"image_token_list": [64], "cut_ratio_list": [0.67]},
    ],
)
def test_a_number_and_a_share_of_the_same_tokens_are_refused(options):
    with pytest.raises(ValueError, match=f"{' and '.join(options)} say the same"):
        VScan(**options)


def test_what_is_left_may_be_said_in_place_of_an_average():
    VScan(encoder_token_num=192, image_token_list=[64]).check(576, 32)
    VScan(encoder_token_ratio=0.6, cut_ratio_list=[0.67]).check(1000, 28)
