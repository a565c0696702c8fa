"""TOPS: the set, its schedules, and who rates."""

import pytest
import torch

from llava.pruning import build_pruner, trace_pruning
from llava.pruning.ops import cosines
from llava.pruning.testing.tiny import video
from llava.pruning.tops import TOPS, above_mean, preserve
from tests.conftest import SIDE, make_pruner

RIGHT, UP, LEFT = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]


def picks(features, relevance, count, lam=0.5, alpha=0.5, by_mean=False) -> list[int]:
    features, relevance = torch.tensor([features]), torch.tensor([relevance])
    real = torch.ones(relevance.shape, dtype=torch.bool)
    weights = torch.tensor([[lam, alpha]])
    return preserve(features, relevance, real, weights, count, by_mean)[0][0].tolist()


def test_the_most_relevant_token_is_first_and_a_distant_one_follows():
    assert picks([RIGHT, RIGHT, UP, LEFT], [0.9, 0.8, 0.1, 0.0], 2, lam=0.0, alpha=5.0) == [0, 3]


def test_coverage_prefers_the_token_that_others_resemble():
    assert picks([RIGHT, LEFT, UP, UP, UP], [0.9, 0.1, 0.1, 0.1, 0.1], 2, lam=1, alpha=0) == [0, 2]


def test_without_coverage_and_diversity_it_is_the_order_of_relevance():
    relevance = [0.3, 0.9, 0.1, 0.9, 0.5]
    assert picks([RIGHT, UP, LEFT, RIGHT, UP], relevance, 5, lam=0, alpha=0) == [1, 3, 4, 0, 2]


def test_the_mark_of_what_is_taken_decides_between_no_equals():
    near = [[1.0, x / 8] for x in range(6)]
    assert picks(near, [1.0, 0, 0, 0, 0, 0], 6, lam=0, alpha=0) == list(range(6))
    assert picks(near[::-1], [0, 0, 0, 0, 0, 1.0], 6, lam=0, alpha=0) == [5, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("by_mean, size", [(False, 16), (False, 69), (True, 69)])
def test_copies_with_equal_relevance_are_taken_in_order(by_mean, size):
    assert picks([RIGHT] * size, [0.25] * size, size, by_mean=by_mean) == list(range(size))


@pytest.mark.parametrize("by_mean", [False, True])
def test_a_zero_token_resembles_nothing_not_even_itself(by_mean):
    """By hand: token 3 covers itself and half of 5, a zero one nothing; then 5, then 4, which adds
    nothing to either."""
    nothing, others = [0.0] * 4, [[1.0, 1, -1, -1], [1.0, -1, 1, 1], [-1.0, 1, 1, -1]]
    features = [nothing, [1.0] * 4, nothing, *others]
    relevance = [0.1, 0.9, 0.5, 0.3, 0.35, 0.2]
    assert picks(features, relevance, 2, 1.0, 0.5, by_mean)[1] != 2
    assert picks(features, relevance, 6, lam=1.0) == [1, 3, 5, 4, 2, 0]


@pytest.mark.parametrize("by_mean", [False, True])
def test_zero_tokens_count_nothing_in_the_coverage_of_any(by_mean):
    """Each further pick of a set with zero tokens is the one that slow sums give."""
    draw = torch.Generator().manual_seed(4)
    x, relevance = torch.randn(12, 16, generator=draw), torch.rand(12, generator=draw)
    x[[2, 5, 7]] = 0
    alike, size = cosines(x[None])[0].double(), torch.arange(12)
    order = [int(relevance.argmax())]
    rating = scaled_by(relevance.double(), by_mean)
    while len(order) < 12:
        near = alike[order].amax(dim=0)
        free = size[~torch.isin(size, torch.tensor(order))]
        gain = (alike[free][:, free] - near[free]).clamp(min=0).sum(dim=1)
        score = rating[free] + sum(0.5 * scaled_by(own, by_mean) for own in (gain, 1 - near[free]))
        order.append(int(free[score.argmax()]))
    assert picks(x.tolist(), relevance.tolist(), 12, by_mean=by_mean) == order


def scaled_by(values, by_mean):
    if by_mean:
        return values / values.mean().clamp(min=1e-9)
    return (values - values.min()) / (values.max() - values.min()).clamp(min=1e-9)


@pytest.mark.parametrize("by_mean", [False, True])
def test_padding_and_other_images_change_nothing(by_mean):
    features, relevance = torch.randn(2, 24, 8), torch.rand(2, 24)
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.2]])
    real = torch.ones(2, 24, dtype=torch.bool)
    real[1, 15:] = False
    together, scores = preserve(features, relevance, real, weights, 12, by_mean)
    for row, count in ((0, 24), (1, 15)):
        own = features[row : row + 1, :count], relevance[row : row + 1, :count]
        alone, expected = preserve(*own, real[:1, :count], weights[row : row + 1], 12, by_mean)
        assert torch.equal(together[row], alone[0])
        torch.testing.assert_close(scores[row], expected[0])
        assert len(set(alone[0].tolist())) == 12


@pytest.mark.parametrize("by_mean", [False, True])
def test_padding_is_never_picked_however_much_it_is_looked_at(by_mean):
    """It stands on the first tokens of the prompt, to which words attend far more."""
    features, real = torch.eye(6)[None], torch.arange(6)[None] < 4
    for relevance in ([2e-7] * 4, [2e-7, 2.1e-7, 1.9e-7, 1.8e-7]):
        given = torch.tensor([[*relevance, 0.9, 0.1]]), real, torch.tensor([[0.5, 0.5]])
        order, _ = preserve(features, *given, 4, by_mean)
        assert sorted(order[0].tolist()) == [0, 1, 2, 3]


def test_raters_look_at_the_image_as_much_as_the_mean_of_those_asked():
    looks = torch.tensor([[0.1, 0.5, 0.3, 9.0], [0.2, 0.2, 0.2, 0.0]])
    asked = torch.tensor([[True, True, True, False], [True, True, True, False]])
    assert above_mean(looks, asked).int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("label", "depth", "schedule"),
    [
        (64, 32, [128] * 13 + [64] * 12 + [16] * 7),
        (128, 32, [256] * 13 + [128] * 12 + [32] * 7),
        (32, 40, [64] * 16 + [32] * 15 + [8] * 9),
    ],
)
def test_the_published_schedules(label, depth, schedule):
    assert build_pruner("tops", visual_token_num=label).token_schedule(576, depth) == schedule


def test_the_published_schedules_of_llava_next_and_of_blocks():
    on_next = build_pruner("tops", visual_token_num=320).token_schedule(576, 32, crops=5)
    assert on_next == [640] * 13 + [320] * 12 + [80] * 7
    pruner = build_pruner("tops", visual_token_num=256)
    pruner.own_grids = True
    assert pruner.token_schedule(1296, 28) == [512] * 13 + [281] * 4 + [77] * 11


@pytest.mark.parametrize("budget", [32, 64, 128, 192, 320])
def test_a_label_is_more_than_its_average_unless_the_average_is_asked_for(budget):
    label = build_pruner("tops", visual_token_num=budget).token_schedule(576, 32)
    average = build_pruner("tops", visual_token_num=budget, average=True).token_schedule(576, 32)
    assert sum(label) / 32 > budget >= sum(average) / 32 > budget - 2


@pytest.mark.parametrize(
    ("label", "depth", "crops", "lam"),
    [
        (128, 32, 1, 0.5),
        (64, 32, 1, 1.0),
        (192, 32, 1, 0.5),
        (64, 40, 1, 0.4),
        (320, 32, 5, 0.4),
        (640, 40, 5, 0.5),
    ],
)
def test_the_weight_of_coverage_is_that_of_the_nearest_published_budget(label, depth, crops, lam):
    class Sizes:
        decoder = torch.nn.Module()

        @staticmethod
        def image_numbers(name):
            return [[{"tops_share": label / (576 * crops), "tops_kind": crops > 1}[name]]]

    Sizes.decoder.layers = [None] * depth
    assert TOPS().weights(Sizes) == [(lam, 0.5)]
    assert TOPS(lam=0.7, alpha=0.1).weights(Sizes) == [(0.7, 0.1)]


def test_crops_of_an_image_compete(anyres_model, sample):
    anyres_model.pruner = make_pruner("tops", 40)
    images = [torch.randn(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))]
    options = dict(image_sizes=[(2 * SIDE, 2 * SIDE)], max_new_tokens=1)
    with trace_pruning(anyres_model) as trace:
        anyres_model.generate(sample(4, "image", 5).ids, images=images, **options)
    kept = trace.visual_positions[0]
    assert len(kept) == 80 and int(trace.visual_tokens[-1][0]) == 10
    assert len({len(kept[kept // 36 == crop]) for crop in range(5)}) > 1


def test_positions_are_counted_anew_after_a_cut(model, sample):
    model.pruner, seen = make_pruner("tops"), []
    hook = type(model.pruner).before_layer

    def spy(index, prefill):
        prefill = hook(model.pruner, index, prefill)
        seen.append(prefill.position_ids[0].tolist())
        return prefill

    model.pruner.before_layer = spy
    model.generate(
        sample(4, "image", 5).ids, images=sample("image").images, max_new_tokens=1, do_sample=False
    )
    assert all(places == list(range(len(places))) for places in seen)
    assert [len(places) for places in seen] == [30] * 3 + [20] * 2 + [12]


@pytest.mark.parametrize("raters", ["threshold", "all", "last"])
def test_words_rate_the_images_before_them(model, sample, raters):
    """An image behind all words is rated by the last prompt token, which is its own."""
    model.pruner = build_pruner("tops", visual_token_num=10, raters=raters)
    prompt = sample(2, "image", 6, "image")
    with trace_pruning(model) as trace:
        model.generate(prompt.ids, images=prompt.images, max_new_tokens=1, do_sample=False)
    assert [int(n[0]) for n in trace.visual_tokens] == [40, 40, 40, 20, 20, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "max"}, "unknown normalize 'max', choose from minmax, mean"),
        ({"raters": "first"}, "unknown raters 'first', choose from threshold, all, last"),
        ({"alpha": -1}, "at least 0"),
        ({"pruning_layers": [12]}, "must name two layers"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_pruner("tops", **options)
    with pytest.raises(ValueError, match="must ascend and leave a layer of 6"):
        build_pruner("tops", pruning_layers=[2, 5]).check_depth(6)


@pytest.mark.parametrize("label, left", [(64, (71, 19)), (128, (139, 39)), (256, (281, 77))])
def test_cuts_of_blocks_leave_the_numbers_of_the_paper(label, left):
    pruner = build_pruner("tops", visual_token_num=label)
    pruner.own_grids = True
    schedule = pruner.token_schedule(1296, 28)
    assert schedule[0] == 2 * label and (schedule[13], schedule[17]) == left


def test_the_first_layer_may_rate_and_the_last_one_may_not():
    build_pruner("tops", pruning_layers=[0, 4]).check_depth(6)
    with pytest.raises(ValueError, match="must ascend and leave a layer of 6"):
        build_pruner("tops", pruning_layers=[-1, 4]).check_depth(6)


@pytest.mark.parametrize("budget, pairs", [(2, 2), (3, 3), (7, 2), (10, 3)])
def test_a_video_has_the_sum_of_the_labels_of_its_pairs(own_grids_model, sample, budget, pairs):
    own_grids_model.pruner = pruner = build_pruner("tops", average=True, visual_token_num=budget)
    with trace_pruning(own_grids_model) as trace:
        given = dict(images=[video(pairs, 6, 6)], max_new_tokens=1, do_sample=False)
        own_grids_model.generate(sample(4, "image", 5).ids, **given)
    label = pairs * pruner.for_part(pairs).label(36, 6)
    entered = [int(tokens[0]) for tokens in trace.visual_tokens]
    assert entered == pruner.image_schedule(2 * label, 6, 36, label)
    assert entered[-1] < entered[0] == 2 * label
