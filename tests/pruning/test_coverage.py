"""Greedy coverage on inputs small enough to try all choices."""

import pytest
import torch

from llava.pruning.coverage import cover_most
from llava.pruning.ops import cosines


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def picks(cover, count, factor=None) -> list[list[int]]:
    return cover_most(torch.as_tensor(cover).float().clone(), count, factor).tolist()


def test_every_pick_adds_most_to_what_is_covered():
    cover = random(3, 12, 20)
    found = cover_most(cover.clone(), 6)
    for row, order in zip(cover.double(), found.tolist(), strict=True):
        chosen = []
        for pick in order:
            free = [n for n in range(12) if n not in chosen]
            covered = {n: float(row[[*chosen, n]].amax(dim=0).sum()) for n in free}
            assert pick == max(covered, key=covered.get)
            chosen.append(pick)


def test_a_factor_multiplies_what_is_gained():
    assert picks([[[3, 0], [0, 2]]], 1) == [[0]]
    assert picks([[[3, 0], [0, 2]]], 1, torch.tensor([[0.5, 1.0]])) == [[1]]


def test_where_nothing_is_gained_tokens_follow_in_order_of_place():
    covered_by_one = [[[0, 0], [1, 1], [0, 0], [1 + 5e-7, 0], [0, 0]]]
    assert picks(covered_by_one, 5) == [[1, 0, 2, 3, 4]]
    nothing_counts = torch.tensor([[0.0, 0.0, 0.0]])
    assert picks([[[1, 2], [2, 2], [2, 3]]], 3, nothing_counts) == [[0, 1, 2]]


@pytest.mark.parametrize("weight", [1e-9, 1.0, 1e6])
def test_what_clients_count_together_changes_no_choice(weight):
    """Of thousands of tokens with a share of every client, each adds less than rounding of 1."""
    cover = random(2, 16, 16)
    expected = cover_most(cover.clone(), 8)
    assert expected.diff(dim=1).lt(0).any()
    assert torch.equal(cover_most(cover * weight, 8), expected)
    assert picks(torch.zeros(1, 4, 4), 3) == [[0, 1, 2]]


def test_equal_gains_go_to_the_lower_place():
    assert picks([[[1, 0], [0, 1], [1, 0], [0, 1]]], 4) == [[0, 1, 2, 3]]


def test_what_is_below_zero_covers_nothing():
    assert picks([[[-5, 1], [2, 0]]], 2) == [[1, 0]]


@pytest.mark.parametrize("count, kept", [(0, 0), (1, 1), (4, 4), (9, 4)])
def test_no_more_tokens_are_picked_than_there_are(count, kept):
    found = cover_most(random(2, 4, 3), count)
    assert found.shape == (2, kept) and all(len(set(row)) == kept for row in found.tolist())


def test_images_of_a_batch_and_clients_that_do_not_count_change_nothing():
    cover = random(3, 16, 16)
    together = cover_most(cover.clone(), 8)
    for number in range(3):
        wide = torch.cat([cover[number : number + 1], torch.zeros(1, 16, 21)], dim=2)
        assert torch.equal(cover_most(wide, 8)[0], together[number])


def test_copies_have_a_cosine_of_one_and_nothing_has_none():
    x = random(1, 40, 24) - 0.5
    x[:, 20:] = 3 * x[:, :20]
    x[:, 5] = 0
    found = cosines(x)[0]
    twins = torch.arange(20)[torch.arange(20) != 5]
    assert (found[twins, twins + 20] == 1).all() and (found[twins, twins] == 1).all()
    assert not found[5].any() and (found.abs() <= 1).all()
