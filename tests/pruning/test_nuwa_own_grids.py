"""Nüwa where images have grids of their own, on inputs small enough to check by hand."""

import math

import pytest
import torch

from llava.pruning import trace_pruning
from llava.pruning.nuwa import QWEN, Nuwa, View, choose, last_three, nuwa, proximity
from llava.pruning.testing.tiny import pad_batch, picture, sample, video
from tests.conftest import SIDE


@pytest.fixture
def model(own_grids_model):
    return own_grids_model


@pytest.fixture
def made(model):
    """Makes a setting and assigns it."""

    def make(**options) -> Nuwa:
        model.pruner = Nuwa(**options)
        return model.pruner

    return make


@pytest.mark.parametrize(
    "share, first, second", [(0.25, 51, 21), (0.5, 86, 56), (0.75, 122, 85), (1.0, 143, 143)]
)
def test_the_released_shares(made, share, first, second):
    """0.35, 0.6 and 0.85 enter, and 0.42, 0.66 and 0.7 of those stay; 143 tokens are 11 x 13."""
    schedule = made(visual_token_ratio=share).token_schedule(143, 28)
    assert schedule == [first] * 15 + [second] * 13
    number = made(visual_token_num=round(share * 143))
    assert number.token_schedule(143, 28) == schedule


@pytest.mark.parametrize("count", [12, 143, 1000])
def test_every_other_budget_is_the_average_over_the_layers(made, count):
    for budget in range(1, count + 1):
        if budget in {round(share * count) for share in (0.25, 0.5, 0.75)}:
            continue
        schedule = made(visual_token_num=budget).token_schedule(count, 28)
        assert abs(sum(schedule) / 28 - budget) <= 13 / 28 / 2
        assert 1 <= min(schedule) and max(schedule) <= min(count, 7 / 4 * budget + 1)


def test_the_layers_are_those_of_the_release(made):
    pruner = made()
    assert pruner.cut_layer(28) == 15 and pruner.cut_layer(36) == 19
    assert pruner.probe(28).layers == (14,) and pruner.probe(28).rows is last_three
    assert list(pruner.tower_extras(32, 31)) == list(range(7, 24))
    assert made(layer=4).cut_layer(28) == 4


def test_defaults_of_the_grid(made):
    pruner = made(visual_token_ratio=0.5).with_budget_of(143)
    view = pruner.block_view(11, 13)
    assert view == View(11, 13, 86, top=3, quantile=0.1, blocks=True)
    assert pruner.squared_radius(view) == pytest.approx(0.8**2 * (11**2 + 13**2))
    assert made(visual_token_ratio=0.75).with_budget_of(143).block_view(11, 13).top == 4
    own = made(distance=9, pillar_quantile=0.4, top_per_region=1, region=False)
    view = own.block_view(11, 13)
    assert (view.quantile, view.top, own.squared_radius(view)) == (0.4, 0, 9)


def test_a_setting_for_one_kind_of_model_is_refused_by_the_other(model, make_model):
    pruner, clip = Nuwa(visual_token_num=8), make_model()
    model.pruner = pruner
    clip.pruner = pruner
    with pytest.raises(ValueError, match="make one for each model"):
        model(sample(4, "image", 5).ids, images=[picture(4, 9)])
    model.pruner = pruner
    with pytest.raises(ValueError, match="make one for each model"):
        clip(sample(4, "image", 5).ids, images=torch.randn(1, 3, SIDE, SIDE))


def test_cells_at_the_border_offer_what_they_have():
    salience = torch.tensor([[1.0, 2, 9, 3, 4, 8, 7, 6, 5]])  # 3 x 3: four cells
    blocks = dict(quantile=0.5, blocks=True)
    assert choose(salience, View(3, 3, 2, 1, **blocks)).tolist() == [[2, 6]]
    assert choose(salience, View(3, 3, 4, 1, **blocks)).tolist() == [[2, 4, 6, 8]]
    assert choose(salience, View(3, 3, 9, 3, **blocks)).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert choose(salience, View(3, 3, 9, 4, **blocks)).tolist() == [list(range(9))]


def slow_collect(pruner, features, similar, salience, chosen, view):
    """As `collect`, one token after the other, from whole rows."""
    plain = features.take_along_dim(chosen[..., None], dim=1)
    lead = plain.norm(dim=-1) if pruner.pillar_mode == "l2norm" else salience.gather(1, chosen)
    out, pillars = plain.clone(), torch.zeros(chosen.shape, dtype=torch.bool)
    unit = similar / similar.norm(dim=-1, keepdim=True)
    near = proximity(chosen, view, pruner.squared_radius(view))
    for row, places in enumerate(chosen.tolist()):
        threshold = lead[row].quantile(view.quantile)
        for number, place in enumerate(places):
            if lead[row, number] >= threshold and pruner.pillar_mode != "none":
                pillars[row, number] = True
                continue
            weight = (unit[row, place] @ unit[row].T).relu() * near[row, number]
            weight = weight / (weight.sum() + 1e-8)
            if not view.blocks:
                weight[place] = 1
            out[row, number] = weight @ features[row]
    return out, pillars


@pytest.mark.parametrize("mode", ["salience", "l2norm", "none"])
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.5, 0.55, 1.0])
def test_collecting_for_few_is_collecting_for_all(mode, blocks, quantile):
    generator = torch.Generator().manual_seed(int(100 * quantile))
    features, similar = torch.randn(2, 2, 35, 6, generator=generator)
    salience = torch.rand(2, 35, generator=generator)
    salience[1] = salience[1].round(decimals=1)  # with equal ones
    for keep in (1, 2, 11, 20):
        view = View(5, 7, keep, 0, quantile, blocks=blocks)
        pruner = Nuwa(pillar_mode=mode)
        given = features, similar, salience, choose(salience, view), view
        (blended, pillar), (expected, pillars) = (
            pruner.collect(*given),
            slow_collect(pruner, *given),
        )
        assert torch.equal(pillar, pillars)
        torch.testing.assert_close(blended, expected, atol=1e-5, rtol=1e-4)


def test_the_weights_of_a_collector_add_up_to_one():
    features, similar = torch.full((1, 6, 1), 5.0), torch.rand(1, 6, 3)
    view = View(2, 3, 6, 0, quantile=1.0, blocks=True)
    blended, pillar = Nuwa().collect(
        features, similar, torch.arange(6.0)[None], torch.arange(6)[None], view
    )
    assert pillar.sum() == 1
    torch.testing.assert_close(blended, torch.full((1, 6, 1), 5.0))


@torch.no_grad()
def test_tokens_stay_in_place_and_pillars_are_the_tokens_of_the_unpruned_image(model):
    (dense,) = model.image_tokens([picture(4, 9)])
    model.pruner = Nuwa(visual_token_ratio=0.5)
    (image,) = model.image_tokens([picture(4, 9)])
    assert len(image.patches) == math.ceil(0.6 * 36) and image.extent == dense.extent
    assert torch.equal(image.positions, dense.positions[image.patches])
    same = (image.embeds - dense.embeds[image.patches]).abs().amax(dim=1) < 1e-6
    collectors = math.ceil(0.1 * (len(same) - 1))
    assert int((~same).sum()) == collectors


@torch.no_grad()
def test_the_second_stage_asks_the_last_three_tokens(model):
    """The mean of their rows, of the head that attends most."""
    rows = []

    class Sees(Nuwa):
        def before_layer(self, index, prefill):
            if prefill.attention is not None:
                wide = torch.arange(prefill.hidden_states.shape[1] - 3, prefill.last[0] + 1)
                rows.append((prefill.attention, wide, self.score(prefill), prefill))
            return super().before_layer(index, prefill)

    model.pruner = pruner = Sees(visual_token_ratio=0.5)
    with trace_pruning(model) as trace:
        model(sample(4, "image", 5).ids, images=[picture(4, 9)])
    ((attention, wide, score, prefill),) = rows
    assert last_three(prefill)[0].tolist() == wide.tolist()
    assert torch.equal(score[0], attention[0].mean(dim=1).amax(dim=0))
    visual = prefill.visual_index[0] == 0
    second = int(trace.visual_tokens[-1])
    best = score[0].masked_fill(~visual, -1).topk(second).indices.sort().values
    kept = torch.cat([best, (~visual).nonzero()[:, 0]]).sort().values
    assert torch.equal(trace.decoder_keep[pruner.cut_layer(6)][0], kept)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(1, 1), (1, 2)])
def test_a_prompt_of_less_than_three_tokens_runs_alone_and_in_a_batch(model, grid):
    model.pruner = Nuwa(visual_token_num=1)
    short, long = sample("image").ids, sample(4, "image", 5).ids
    ids, mask = pad_batch([short, long])
    together = model(ids, attention_mask=mask, images=[picture(*grid), picture(4, 9)])
    alone = model(short, images=[picture(*grid)])
    torch.testing.assert_close(together.logits[0, -1], alone.logits[0, -1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_second_stage_can_be_random_or_off(model):
    kept = {}
    for stage2 in ("attention", "random", "off"):
        model.pruner = Nuwa(visual_token_ratio=0.5, stage2=stage2)
        with trace_pruning(model) as trace:
            model(sample(4, "image", 5).ids, images=[picture(4, 9)])
        own = model.pruner.with_budget_of(36)
        assert [int(n) for n in trace.visual_tokens] == own.token_schedule(36, 6)
        kept[stage2] = trace.decoder_keep
    assert kept["off"] == {}
    assert len(kept["random"][3][0]) == len(kept["attention"][3][0])
    assert not torch.equal(kept["random"][3][0], kept["attention"][3][0])


@torch.no_grad()
@pytest.mark.parametrize(
    "budget, first, second",
    [({"visual_token_num": 30}, 14, 5), ({"visual_token_ratio": 0.5}, 22, 14)],
)
def test_pairs_of_frames_share_both_stages_of_a_video(model, budget, first, second):
    """A pair of 36 tokens has 10 of 30, or the released share of it."""
    model.pruner = Nuwa(**budget)
    with trace_pruning(model) as trace:
        model(sample(4, "image", 5).ids, images=[video(3, 6, 6)])
    schedule = model.pruner.with_budget_of(108, 3).token_schedule(36, 6, 3)
    assert [int(n) for n in trace.visual_tokens] == schedule == [3 * first] * 3 + [3 * second] * 3


def test_the_entry_point_of_the_release_has_the_radius_of_the_model(model):
    assert nuwa(model, matain_token=12) is model
    assert model.pruner == Nuwa(visual_token_num=12)
    assert model.pruner.squared_radius(View(4, 9, 5, 3, 0.1, blocks=True)) == 0.8**2 * (9 + 81)


def test_it_is_another_variant_after_it_was_on_llava(model, make_model):
    pruner = Nuwa(visual_token_num=8)
    make_model().pruner = pruner
    model.pruner = pruner
    assert pruner.variant is QWEN
    model(sample(4, "image", 5).ids, images=[picture(4, 9)])
