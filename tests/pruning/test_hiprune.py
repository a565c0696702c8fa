"""HiPrune on inputs small enough to check by hand."""

import pytest
import torch

from llava.pruning import build_pruner, trace_pruning
from llava.pruning.hiprune import HiPrune
from tests.conftest import SIDE


def choose(pruner, middle, deep, budget, grid):
    middle, deep = (torch.tensor(x, dtype=torch.float32).flatten()[None] for x in (middle, deep))
    return sorted(pruner.choose(middle, deep, budget, grid)[0].tolist())


def row(*values, size=16):
    """`size` values, those given first, then ever smaller ones."""
    return [*values, *(0.01 / (n + 1) for n in range(size - len(values)))]


def test_an_anchor_brings_its_four_neighbours():
    middle = torch.zeros(16)
    middle[5] = 1.0
    deep = torch.zeros(16)
    deep[15], deep[12] = 0.3, 0.2
    kept = choose(HiPrune(alpha=0.7), middle.tolist(), deep.tolist(), 7, (4, 4))
    assert kept == [1, 4, 5, 6, 9, 12, 15]


def test_no_anchor_fits_a_small_budget():
    kept = choose(HiPrune(alpha=0.1), row(1.0), [*row(0.0)[:-2], 0.5, 0.6], 2, (4, 4))
    assert kept == [14, 15]


def test_neighbours_wrap_at_the_border_as_released_or_are_left_out():
    anchors = torch.tensor([[3, 0]])
    wrapped = HiPrune().with_neighbours(anchors, (4, 4))[0].tolist()
    assert sorted(set(wrapped)) == [0, 1, 2, 3, 4, 7]
    strict = HiPrune(wrap=False).with_neighbours(anchors, (4, 4))[0].tolist()
    assert sorted(set(strict)) == [0, 1, 2, 3, 4, 7]
    left = HiPrune(wrap=False).with_neighbours(torch.tensor([[4]]), (4, 4))[0].tolist()
    assert sorted(set(left)) == [0, 4, 5, 8]
    left = HiPrune().with_neighbours(torch.tensor([[4]]), (4, 4))[0].tolist()
    assert sorted(set(left)) == [0, 3, 4, 5, 8]


@pytest.mark.parametrize("budget", range(1, 17))
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_every_budget_is_met_exactly(budget, alpha):
    generator = torch.Generator().manual_seed(budget)
    middle, deep = torch.rand(2, 16, generator=generator).tolist()
    assert len(set(choose(HiPrune(alpha=alpha), middle, deep, budget, (4, 4)))) == budget


def test_images_share_their_budget_among_their_own_crops(anyres_model, sample):
    model = anyres_model
    model.pruner = build_pruner("hiprune", visual_token_num=50)
    generator = torch.Generator().manual_seed(5)
    images = [torch.randn(n, 3, SIDE, SIDE, generator=generator) for n in (3, 5)]
    sizes = [(SIDE, 2 * SIDE), (2 * SIDE, 2 * SIDE)]
    with trace_pruning(model) as trace:
        model(sample(4, "image", 5, "image").ids, images=images, image_sizes=sizes)
    assert [len(kept) for kept in trace.visual_positions] == [48, 50]


def test_the_layer_of_the_anchors_follows_the_depth_of_the_tower(model):
    assert sorted(HiPrune().tower_extras(24, 22)) == [8, 22]
    assert sorted(HiPrune(object_layer=4).tower_extras(24, 22)) == [3, 22]
    with pytest.raises(ValueError, match="object_layer .4. must be at most 3"):
        model.pruner = HiPrune(object_layer=4, visual_token_num=4)


@pytest.mark.parametrize("options", [{"alpha": 1.5}, {"object_layer": 0}])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ValueError, match="must|counts"):
        HiPrune(**options)
