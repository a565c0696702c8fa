"""SinkPruner: pools, the token of the sinks, schedules, and the cuts by what words look at."""

import pytest
import torch

from llava.pruning import build_pruner, trace_pruning
from llava.pruning.sinkpruner import sanitize
from llava.pruning.tokens import VisionTokens
from tests.conftest import SIDE, make_pruner


def test_large_norms_are_sinks_and_the_best_of_the_others_stay():
    features = torch.eye(6)[None] * torch.tensor([1.0, 9.0, 1.0, 1.0, 8.0, 1.0])[None, :, None]
    features[0, 5] = features[0, 0]  # as salient as it is, and the same
    salience = torch.tensor([[0.5, 0.9, 0.3, 0.2, 0.8, 0.1]])
    high, salient, diverse = sanitize(features, salience, 2, 1, 2, 1)
    assert (high.tolist(), salient.tolist(), diverse.tolist()) == ([[1, 4]], [[0]], [[2, 3]])


@pytest.mark.parametrize("step", [1, 3, 16])
def test_diverse_tokens_are_unlike_all_that_were_taken(step):
    features, salience = torch.randn(2, 40, 8), torch.rand(2, 40)
    high, salient, diverse = sanitize(features, salience, 3, 5, 12, step)
    unit = features / features.norm(dim=-1, keepdim=True)
    for row in range(2):
        taken, left = salient[row].tolist(), set(range(40)) - set(high[row].tolist())
        left -= set(taken)
        for start in range(0, 12, step):
            near = {n: (unit[row, n] @ unit[row, taken].T).max().item() for n in sorted(left)}
            best = sorted(near, key=near.get)[: min(step, 12 - start)]
            assert diverse[row, start : start + step].tolist() == best
            taken += best
            left -= set(best)


@pytest.mark.parametrize("step", [1, 4])
def test_copies_of_what_was_taken_follow_in_order(step):
    base = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    kind = torch.tensor([0, 1, 2, 3, 4] + [2, 4, 0, 1, 3] * 6)
    salience = torch.zeros(1, 35)
    salience[0, :5] = 1.0
    _, _, diverse = sanitize(base[kind][None], salience, 0, 5, 30, step)
    assert diverse.tolist() == [list(range(5, 35))]


@pytest.mark.parametrize(
    ("label", "entering", "left", "average"),
    [
        (128, 257, (230, 130, 92), 130.3),
        (64, 129, (110, 74, 42), 64.9),
        (32, 65, (54, 36, 22), 32.6),
    ],
)
def test_the_published_schedules(label, entering, left, average):
    schedule = build_pruner("sinkpruner", visual_token_num=label).token_schedule(576, 32)
    first, second, third = left
    assert schedule == [entering] * 2 + [first] * 4 + [second] * 9 + [third] * 17
    assert sum(schedule) / 32 == pytest.approx(average, abs=0.06)


def test_labels_between_the_published_ones_and_above_come_close_to_their_average():
    for label in (48, 96, 192, 320):
        schedule = build_pruner("sinkpruner", visual_token_num=label).token_schedule(576, 32)
        assert 0.9 * label < sum(schedule) / 32 < 1.1 * label


def test_crops_of_llava_next_have_a_fifth_each():
    pruner = build_pruner("sinkpruner", visual_token_num=320)
    schedule = pruner.token_schedule(576, 32, crops=5)
    assert schedule[0] == 5 * 129 and schedule[-1] == 5 * 42


def test_numbers_of_more_tokens_than_a_crop_has_take_all_that_are_no_sinks():
    pruner = build_pruner("sinkpruner", salient_token_num=20, diverse_token_num=500)
    assert pruner.pools(10, 36) == (1, 20, 15) and pruner.entering(10, 36) == 36


def test_shares_of_blocks_are_those_of_the_paper():
    for share, entering, last in ((0.333, 50, 25), (0.222, 50, 12), (0.111, 25, 6)):
        pruner = build_pruner("sinkpruner", visual_token_ratio=share)
        pruner.own_grids = True
        schedule = pruner.token_schedule(900, 28)
        assert schedule[0] == 9 * entering + 1 and schedule[-1] == 9 * last


def vision(count: int = 36) -> VisionTokens:
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(count).expand(1, -1)
    features = torch.randn(1, count, 8, generator=generator)
    features[0, 20] *= 9
    salience = torch.rand(1, count, generator=generator)
    return VisionTokens(features, places, grid=(6, 6), salience=salience)


def test_the_token_of_the_sinks_stands_first_and_the_groups_in_raster_order():
    pruner, given = build_pruner("sinkpruner", visual_token_num=9), vision()
    clean = pruner.after_encoder(given)
    high, salient, diverse = pruner.pools(9, 36)
    places = clean.positions[0].tolist()
    assert (high, salient, diverse) == (1, 9, 9) and len(places) == 19
    assert places[0] == -1 and 20 not in places
    torch.testing.assert_close(clean.features[0, 0], given.features[0, 20])
    assert places[1:10] == sorted(places[1:10]) and places[10:] == sorted(places[10:])
    assert clean.extras["merged"][0].tolist() == [True] + [False] * 18
    best = given.salience[0].scatter(0, torch.tensor(20), -1.0).topk(9).indices
    assert places[1:10] == best.sort().values.tolist()


def test_without_sinks_there_is_no_such_token():
    pruner = build_pruner("sinkpruner", visual_token_num=9, sink_ratio=0)
    clean = pruner.after_encoder(vision())
    assert clean.positions.shape[1] == 18 and (clean.positions >= 0).all()
    assert "merged" not in clean.extras


def test_where_tokens_have_places_the_one_of_the_sinks_has_that_of_the_largest():
    pruner = build_pruner("sinkpruner", visual_token_num=9)
    pruner.own_grids, given = True, vision()
    given.block = 4
    clean = pruner.after_encoder(given)
    places = clean.positions[0].tolist()
    assert places == sorted(places) and clean.extras["merged"][0][places.index(20)]


def test_a_cut_goes_by_what_words_look_at_in_the_layer_about_to_run(model, sample):
    prompt = sample(3, "image", 4)
    pruner = build_pruner(
        "sinkpruner", visual_token_num=9, layer_list=[2], cut_token_list=[5], sink_ratio=0
    )
    model.pruner, seen = pruner, {}
    score = pruner.score

    def note(prefill, kept):
        seen["prefill"] = prefill
        return score(prefill, kept)

    model.pruner.score = note
    with trace_pruning(model) as trace:
        model.generate(prompt.ids, images=prompt.images, max_new_tokens=1, do_sample=False)
    prefill = seen["prefill"]
    size = prefill.index.shape[1]
    rows = torch.arange(size - 4, size)[None]
    looks = prefill.attention_rows(2, rows)[0].mean(dim=(0, 1))[4 : size - 4]
    best = looks.argsort(descending=True, stable=True)[:5].sort().values + 4
    assert trace.decoder_keep[2][0][4:9].tolist() == best.tolist()
    assert trace.visual_tokens[-1].tolist() == [5]


def test_the_cuts_can_be_left_out(model, sample):
    model.pruner = build_pruner("sinkpruner", visual_token_num=9, text_pruner=False)
    with trace_pruning(model) as trace:
        model.generate(sample(4, "image", 5).ids, images=sample("image").images, max_new_tokens=1)
    assert {int(tokens[0]) for tokens in trace.visual_tokens} == {19}


def test_tiles_have_their_sinks_behind_them(anyres_model, sample):
    anyres_model.pruner = make_pruner("sinkpruner", 50)
    images = [torch.randn(5, 3, SIDE, SIDE)]
    options = dict(image_sizes=[(2 * SIDE, 2 * SIDE)], max_new_tokens=1)
    with trace_pruning(anyres_model) as trace:
        anyres_model.generate(sample(4, "image", 5).ids, images=images, **options)
    kept = trace.visual_positions[0]
    assert len(kept) == 5 * 21 and kept[0] == -1 and kept[-4:].tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sink_ratio": 1.0}, r"sink_ratio \(1.0\) must lie between 0"),
        ({"picks_per_round": 0}, "at least 1 patch"),
        ({"salient_token_num": -1}, "at least 0 patches"),
        ({"layer_list": [2, 6]}, "one entry per cut"),
        ({"cut_token_list": [5, 0, 1]}, "at least 1 token"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_pruner("sinkpruner", **options)
