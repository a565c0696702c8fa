"""SCOPE on inputs small enough to check by hand."""

import pytest
import torch

from llava.pruning import build_pruner
from llava.pruning.scope import cover_salient
from tests.golden_checks.methods import tokens_of

FEATURES = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [-1, 0]]])


def order(salience, count=5, **options) -> list[int]:
    pruner = build_pruner("scope", visual_token_num=count, **options)
    vision = tokens_of(FEATURES, salience=torch.tensor([salience]), num_heads=1)
    return pruner.pick(vision, slice(None), count)[0].tolist()


def test_attention_decides_between_tokens_that_cover_alike():
    assert order([0.1, 0.1, 0.1, 0.1, 0.4], 1) == [4]
    assert order([0.3, 0.1, 0.2, 0.1, 0.1], 2) == [0, 2]


def test_without_attention_the_picks_cover_all_directions():
    assert sorted(order([0.9, 0.8, 0.01, 0.01, 0.01], 3, alpha=0)) in (
        [0, 2, 4],
        [1, 2, 4],
        [1, 3, 4],
    )


def test_a_sum_lets_attention_win_where_a_product_does_not():
    salience = [1.0, 1.0, 0.1, 0.1, 0.1]
    assert set(order(salience, 2)) != {0, 1}
    assert set(order([5.0, 5.0, 0.1, 0.1, 0.1], 2, combine="add")) == {0, 1}


def test_attention_is_the_sum_over_heads():
    pruner = build_pruner("scope", visual_token_num=3, combine="add")
    salience = torch.tensor([[0.3, 0.1, 0.2, 0.1, 0.4]])
    one = pruner.pick(tokens_of(FEATURES, salience=16 * salience), slice(None), 3)
    many = pruner.pick(tokens_of(FEATURES, salience=salience, num_heads=16), slice(None), 3)
    assert torch.equal(one, many)


@pytest.mark.parametrize("add", [False, True])
def test_copies_with_equal_attention_are_taken_in_order(add):
    features = torch.randn(1, 12, 24, generator=torch.Generator().manual_seed(3)).repeat(1, 4, 1)
    found = cover_salient(features, torch.ones(1, 48), 48, add)[0].tolist()
    assert sorted(found[:12]) == list(range(12))
    assert found[12:] == list(range(12, 48))


def test_a_sum_counts_no_gain_below_rounding_but_every_weight():
    found = cover_salient(torch.ones(1, 4, 16), torch.tensor([[0.25, 1e-8, 8.1e-7, 9e-8]]), 4, True)
    assert found.tolist() == [[0, 2, 3, 1]]
    assert cover_salient(torch.eye(4)[None], torch.zeros(1, 4), 4, True).tolist() == [[0, 1, 2, 3]]


def test_in_a_sum_copies_with_equal_weights_are_taken_in_order():
    """In fp32 a sum depends on what stands where in it."""
    draw = torch.Generator().manual_seed(3)
    for _ in range(20):
        features = torch.randn(6, 100, generator=draw)
        weight = torch.rand(6, generator=draw)
        copy = torch.randint(6, (41,), generator=draw)
        found = cover_salient(features[copy][None], weight[copy][None], 41, True)[0]
        for number in range(6):
            own = found[copy[found] == number]
            assert own.tolist() == sorted(own.tolist())


def test_an_image_of_three_crops_has_a_third_for_each():
    pruner = build_pruner("scope", visual_token_num=50)
    assert pruner.token_schedule(36, 2, 3) == [48, 48]


@pytest.mark.parametrize("options", [{"alpha": -1}, {"combine": "divide"}])
def test_what_is_no_setting_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        build_pruner("scope", **options)
