"""DivPrune on inputs small enough to check by hand."""

import pytest
import torch

from llava.pruning import ImageTokens, build_pruner
from llava.pruning.divprune import DivPrune, farthest_first


def angles(*degrees):
    """Unit vectors (1, N, 2) at these angles."""
    radians = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack([radians.cos(), radians.sin()], dim=-1)[None]


def test_the_loneliest_token_is_picked_first_and_then_the_farthest():
    assert farthest_first(angles(0, 10, 180, 90, 100), 3).tolist() == [[2, 0, 3]]


def test_length_does_not_count():
    features = angles(0, 10, 180, 90, 100) * torch.tensor([1.0, 9, 2, 5, 7])[:, None]
    assert farthest_first(features, 3).tolist() == [[2, 0, 3]]


def test_copies_come_last_in_their_order():
    features = torch.eye(3)[[0, 0, 1, 1, 2]][None]
    assert farthest_first(features, 5).tolist() == [[4, 0, 2, 1, 3]]


@pytest.mark.parametrize("seed", range(5))
def test_behind_one_of_each_kind_copies_of_picks_follow_by_their_places(seed):
    base = torch.randn(5, 9, generator=torch.Generator().manual_seed(seed))
    kind = torch.tensor([0, 1, 2, 3, 4, 3, 1, 0, 4, 2, 2, 0, 1])
    assert farthest_first(base[kind][None], 13)[0, 5:].tolist() == list(range(5, 13))


def test_identical_tokens_are_picked_in_order_and_only_once():
    assert farthest_first(torch.ones(1, 6, 4), 4).tolist() == [[0, 1, 2, 3]]


def test_a_single_token_is_kept():
    assert farthest_first(torch.ones(1, 1, 4), 1).tolist() == [[0]]


def test_rows_do_not_influence_each_other():
    features = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0))
    together = farthest_first(features, 7)
    assert all(
        torch.equal(together[i : i + 1], farthest_first(features[i : i + 1], 7)) for i in range(3)
    )


def test_picks_maximise_the_smallest_distance_at_every_step():
    features = torch.randn(1, 15, 5, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(features[0], dim=-1)
    distance = 1 - unit @ unit.T
    order = farthest_first(features, 10)[0].tolist()
    for step in range(1, 10):
        reach = distance[order[:step]].amin(dim=0)
        reach[order[:step]] = -1
        assert order[step] == int(reach.argmax())


@pytest.mark.parametrize("available, kept", [(576, 56), (1176, 115), (10, 1)])
def test_a_ratio_is_rounded_and_leaves_at_least_one(available, kept):
    assert DivPrune(subset_ratio=0.098).num_tokens(available) == kept


def test_a_sequence_with_newlines_is_pruned_as_a_whole():
    image = ImageTokens(
        embeds=angles(0, 10, 180, 90)[0],
        patches=torch.tensor([0, 1, 2, -1]),
        offsets=torch.arange(4),
        length=4,
    )
    kept = DivPrune(visual_token_num=3).after_layout(image)
    assert kept.offsets.tolist() == [0, 2, 3]
    assert kept.patches.tolist() == [0, 2, -1]


def test_anyres_images_share_one_budget(anyres_model, sample):
    anyres_model.pruner = build_pruner("divprune", visual_token_num=50)
    prompt = sample(4, "image", 5)
    images = [torch.randn(3, 3, 84, 84, generator=torch.Generator().manual_seed(5))]
    built = anyres_model.build_prompt(prompt.ids, images=images, image_sizes=[(42, 84)])
    assert int((built.visual_index >= 0).sum()) == 50


@pytest.mark.parametrize("ratio", [0, 1.5])
def test_a_ratio_outside_its_range_is_an_error(ratio):
    with pytest.raises(ValueError, match="subset_ratio"):
        build_pruner("divprune", subset_ratio=ratio)
