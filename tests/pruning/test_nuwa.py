"""Nüwa on inputs small enough to check by hand."""

import importlib

import pytest
import torch

from llava.pruning import trace_pruning
from llava.pruning.nuwa import Nuwa, View, choose, nuwa, proximity
from tests.conftest import SIDE


@pytest.mark.parametrize("budget, first, second", [(64, 112, 16), (128, 224, 32), (192, 336, 48)])
def test_the_published_budgets(budget, first, second):
    schedule = Nuwa(visual_token_num=budget).token_schedule(576, 32)
    assert schedule == [first] * 16 + [second] * 16
    assert sum(schedule) / 32 == budget


@pytest.mark.parametrize(
    "budget, crops, each, top",
    [
        (160, 3, 96, 2),
        (320, 4, 145, 3),
        (640, 5, 232, 3),
        (64, 5, 22, 1),
        (128, 4, 56, 2),
        (192, 3, 112, 3),
    ],
)
def test_the_budgets_of_tiled_images_are_those_of_the_release(budget, crops, each, top):
    pruner = Nuwa(visual_token_num=budget)
    assert pruner.stage1_tokens(576, crops) == each
    assert pruner.view(24, 24, 1, 576, crops).top == top


@pytest.mark.parametrize("budget", range(1, 37))
def test_every_budget_is_the_average_over_the_layers(budget):
    schedule = Nuwa(visual_token_num=budget).token_schedule(36, 6)
    assert sum(schedule) / 6 == budget
    assert min(schedule) >= 1


@pytest.mark.parametrize("top, entering", [(1, 9), (2, 18), (4, 28)])
def test_where_cells_offer_fewer_the_second_stage_keeps_the_average(model, sample, top, entering):
    model.pruner = Nuwa(visual_token_num=16, top_per_region=top)
    seen = [int(n) for n in run(model, sample(4, "image", 5)).visual_tokens]
    assert seen == model.pruner.token_schedule(36, 6)
    assert seen == [entering] * 3 + [min(entering, 32 - entering)] * 3


def test_the_second_stage_follows_the_depth():
    assert Nuwa().cut_layer(40) == 20
    assert Nuwa(layer=16).cut_layer(40) == 16


def test_every_cell_offers_its_best_and_the_best_of_those_stay():
    salience = torch.tensor([[9.0, 8, 1, 2, 7, 6, 3, 4]])  # 2 x 4: two cells
    assert choose(salience, View(2, 4, 2, 1, 0.5)).tolist() == [[0, 7]]
    assert choose(salience, View(2, 4, 3, 2, 0.5)).tolist() == [[0, 1, 7]]
    assert choose(salience, View(2, 4, 3, 0, 0.5)).tolist() == [[0, 1, 4]]


@pytest.mark.parametrize("side", [5, 7])
def test_cells_beside_an_odd_last_row_offer_what_the_schedule_says(side):
    for budget in range(1, side**2):
        pruner = Nuwa(visual_token_num=budget)
        view = pruner.view(side, side, 1, side**2, 1)
        found = choose(torch.rand(1, side**2), view).shape[1]
        assert found == pruner.token_schedule(side**2, 6)[0]


def test_a_grid_of_one_row_has_no_cells():
    """What is left of the tiles of a very thin image, where tiles have an odd number of rows."""
    view = Nuwa(visual_token_num=50).view(1, 14, 2, 49, 3)
    assert choose(torch.rand(1, 14), view).shape[1] == min(14, view.keep) > 0


def test_an_odd_last_row_or_column_is_never_chosen():
    salience = torch.tensor([[1.0, 2, 9, 3, 4, 9, 9, 9, 9]])
    assert choose(salience, View(3, 3, 9, 4, 0.5)).tolist() == [[0, 1, 3, 4]]


def test_equal_salience_goes_to_the_lower_patch():
    assert choose(torch.ones(1, 16), View(4, 4, 3, 1, 0.5)).tolist() == [[0, 2, 8]]


def test_proximity_falls_to_zero_at_the_radius():
    view = View(1, 5, 0, 0, 0)
    assert proximity(torch.tensor([[1]]), view, 4)[0, 0].tolist() == [0.5, 1, 0.5, 0, 0]


def collect(pruner, view, chosen, similar):
    """Features 1, 10, 100, 1000 and salience 0, 1, 2, 3."""
    features = torch.tensor([1.0, 10, 100, 1000])[None, :, None]
    similar = torch.tensor(similar, dtype=torch.float32)[None]
    salience = torch.arange(4.0)[None]
    blended, pillar = pruner.collect(features, similar, salience, torch.tensor([chosen]), view)
    return blended[0, :, 0].tolist(), pillar[0].tolist()


def test_pillars_stay_and_collectors_add_what_is_near_and_similar():
    view = View(1, 4, 2, 0, 0.5)
    values, pillar = collect(Nuwa(distance=4), view, [0, 3], [[1, 0], [1, 0], [0, 1], [1, 0]])
    assert pillar == [False, True]
    # similar: 0, 1 and 3; near: 1 (half) of patches 0 and 1; the own weight is 1 after the division
    assert values == pytest.approx([1 + 10 * 0.5 / 1.5, 1000])


def test_opposite_features_are_not_collected():
    values, _ = collect(Nuwa(), View(1, 4, 2, 0, 0.5), [0, 3], [[1, 0], [-1, 0], [-1, 0], [-1, 0]])
    assert values == pytest.approx([1, 1000])


def test_pillar_modes():
    view, same = View(1, 4, 2, 0, 1.0), [[1, 0]] * 4
    assert collect(Nuwa(pillar_mode="none"), view, [0, 3], same)[1] == [False, False]
    assert collect(Nuwa(pillar_mode="l2norm"), view, [0, 3], same)[1] == [False, True]
    lead = Nuwa(pillar_mode="salience").collect(
        torch.tensor([5.0, 1.0])[None, :, None],
        torch.ones(1, 2, 1),
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[0, 1]]),
        View(1, 2, 2, 0, 1.0),
    )
    assert lead[1].tolist() == [[False, True]]


def run(model, prompt, **images):
    with trace_pruning(model) as trace:
        model(prompt.ids, **({"images": prompt.images} | images))
    return trace


def test_tokens_stand_where_the_unpruned_image_had_them(model, sample):
    model.pruner = Nuwa(visual_token_num=8)
    trace = run(model, sample(4, "image", 5))
    patches = trace.visual_positions[0]
    count = len(patches)
    assert count == 14
    positions = trace.position_ids[0]
    assert positions[:5].tolist() == list(range(5))
    assert torch.equal(positions[5 : 5 + count], patches + 5)
    assert positions[5 + count :].tolist() == list(range(41, 46))


def test_the_second_stage_can_be_random_or_off(model, sample):
    prompt = sample(4, "image", 5)
    kept = {}
    for stage2 in ("attention", "random", "off"):
        model.pruner = Nuwa(visual_token_num=8, stage2=stage2)
        trace = run(model, prompt)
        assert [int(n) for n in trace.visual_tokens] == model.pruner.token_schedule(36, 6)
        kept[stage2] = trace.decoder_keep
    assert kept["off"] == {}
    assert len(kept["random"][3][0]) == len(kept["attention"][3][0]) == 10 + 2


def test_tiles_are_one_grid_with_all_their_newlines(anyres_model, sample):
    model = anyres_model
    model.pruner = Nuwa(visual_token_num=30)
    images = [torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))]
    trace = run(model, sample(4, "image", 5), images=images, image_sizes=[(SIDE, 2 * SIDE)])
    each = round(20 * 30 / 11) // 3
    patches = trace.visual_positions[0]
    assert (patches[:each] < 36).all() and (patches[each:] >= 36).sum() == 2 * each
    assert (patches == -1).sum() == 12
    counts = [int(n) for n in trace.visual_tokens]
    total = 3 * each + 12
    assert counts == [total] * 3 + [total // 10] * 3
    assert trace.position_ids[0, -1] == 10 + 36 + 12 * 7 - 1


def test_images_of_different_shape_share_a_batch(anyres_model, sample):
    model = anyres_model
    model.pruner = Nuwa(visual_token_num=30)
    generator = torch.Generator().manual_seed(5)
    images = [torch.randn(n, 3, SIDE, SIDE, generator=generator) for n in (3, 5)]
    sizes = [(SIDE, 2 * SIDE), (2 * SIDE, 2 * SIDE)]
    prompt = sample(4, "image", 5)
    alone = [
        run(model, prompt, images=[i], image_sizes=[s]).visual_positions[0]
        for i, s in zip(images, sizes, strict=True)
    ]
    both = run(model, sample(4, "image", 5, "image"), images=images, image_sizes=sizes)
    for ours, own in zip(both.visual_positions, alone, strict=True):
        assert torch.equal(ours, own)


def test_the_entry_point_of_the_release(model):
    assert nuwa(model, matain_token=12, distance=148) is model
    assert importlib.import_module("nuwa").nuwa is nuwa  # the name of the release's module
    assert model.pruner == Nuwa(visual_token_num=12, distance=148)


@pytest.mark.parametrize(
    "options",
    [
        {"pillar_mode": "top"},
        {"stage2": "on"},
        {"distance": 0},
        {"pillar_quantile": 2},
        {"top_per_region": 5},
    ],
)
def test_options_out_of_range_are_errors(options):
    assert all(Nuwa(top_per_region=top).top_per_region == top for top in (None, 1, 2, 3, 4))
    with pytest.raises(ValueError, match="must|choose from"):
        Nuwa(**options)
