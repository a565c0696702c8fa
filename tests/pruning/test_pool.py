"""Pool on inputs small enough to check by hand."""

import pytest
import torch

from llava.pruning import VisionTokens, build_pruner
from llava.pruning.pool import cells


def pool(budget, features, grid):
    """The tokens of one crop with features (N,)."""
    vision = VisionTokens(
        features=torch.tensor(features, dtype=torch.float32).view(1, -1, 1),
        positions=torch.arange(len(features))[None],
        grid=grid,
    )
    return build_pruner("pool", visual_token_num=budget).after_encoder(vision)


def test_a_square_budget_averages_square_blocks():
    out = pool(4, list(range(16)), (4, 4))
    assert out.features.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert out.positions.tolist() == [[5, 7, 13, 15]]
    assert out.extras["merged"].all()


def test_a_patch_in_two_cells_counts_in_both_by_its_share():
    out = pool(2, [0, 3, 6], (1, 3))
    torch.testing.assert_close(out.features.flatten(), torch.tensor([1.0, 5.0]))


def test_a_budget_of_one_is_the_mean_of_all():
    assert pool(1, [1, 2, 3, 6], (2, 2)).features.item() == 3.0


def test_a_budget_of_all_patches_changes_nothing():
    out = pool(9, list(range(9)), (3, 3))
    assert out.features.flatten().tolist() == list(range(9))
    assert out.positions.tolist() == [list(range(9))] and not out.extras["merged"].any()


@pytest.mark.parametrize("count", range(1, 37))
def test_any_budget_is_met_and_no_patch_is_left_out(count):
    share, middle = cells((6, 6), count)
    assert share.shape == (count, 36)
    torch.testing.assert_close(share.sum(dim=1), torch.ones(count))
    assert (share.sum(dim=0) > 0).all()
    assert middle.tolist() == sorted(set(middle.tolist())) and middle.max() < 36


@pytest.mark.parametrize("count, per_row", [(64, [8]), (128, [11, 12]), (192, [13, 14])])
def test_cells_are_as_square_as_the_budget_allows(count, per_row):
    _, middle = cells((24, 24), count)
    assert sorted(set(torch.bincount(middle // 24).tolist()) - {0}) == per_row


def test_a_class_token_among_the_patches_is_an_error(make_model):
    model = make_model(mm_vision_select_feature="cls_patch")
    with pytest.raises(ValueError, match="grid of patches.*cls_patch"):
        model.pruner = build_pruner("pool", visual_token_num=9)


def test_wide_grids_have_wide_rows():
    _, middle = cells((2, 8), 4)
    assert middle.tolist() == [9, 11, 13, 15]
