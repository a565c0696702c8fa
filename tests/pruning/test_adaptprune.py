"""AdaptPrune on inputs small enough to check by hand."""

from math import exp

import pytest
import torch

from llava.pruning import ImageTokens, build_pruner, trace_pruning
from llava.pruning.adaptprune import AdaptPrune, cells_of
from tests.conftest import SIDE


def cells(*blocks):
    """(1, n, 5) cells of an unpruned image that is read as these grids."""
    places = torch.arange(sum(rows * columns for rows, columns in blocks))
    return cells_of(ImageTokens(places, places, places, len(places), blocks=blocks))[None]


def pick(pruner, attention, keys, *blocks):
    attention = torch.tensor(attention, dtype=torch.float32)[None]
    keys = torch.as_tensor(keys, dtype=torch.float32)[None]
    return pruner.pick(attention, keys, cells(*blocks), pruner.visual_token_num)[0].tolist()


def flat(**options):
    """Without a preference for the centre."""
    return AdaptPrune(prior_sigma=1e6, **options)


def test_cells_tell_grid_row_and_column():
    block, row, column, rows, columns = cells((2, 2), (1, 3))[0].T.tolist()
    assert block == [1, 1, 1, 1, 2, 2, 2]
    assert row == [0, 0, 1, 1, 0, 0, 0]
    assert column == [0, 1, 0, 1, 0, 1, 2]
    assert (rows, columns) == ([2] * 4 + [1] * 3, [2] * 4 + [3] * 3)


def test_a_token_outside_every_grid_has_no_cell():
    image = ImageTokens(*[torch.tensor([-1, 0, 4])] * 3, 4, blocks=((2, 2),))
    assert (cells_of(image) == 0).all(dim=1).tolist() == [True, False, True]


def test_merged_tokens_of_the_overview_have_no_cell_and_newlines_have_theirs():
    """Four patches, three merged ones behind them, then two rows of three tiles and a newline."""
    offsets = torch.tensor([0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 10, 11])
    patches = torch.tensor([0, 1, 2, 3, -1, -1, -1, 4, 5, 6, -1, 7, 8, 9, -1])
    blocks = ((2, 2), (2, 4))
    image = ImageTokens(torch.zeros(15, 1), patches, offsets, 12, blocks=blocks)
    found = cells_of(image)
    assert (found == 0).all(dim=1).nonzero()[:, 0].tolist() == [4, 5, 6]
    assert found[7].tolist() == [2, 0, 0, 2, 4] and found[10].tolist() == [2, 0, 3, 2, 4]


def test_the_prior_is_a_gaussian_over_the_grid_with_one_at_its_middle():
    prior = AdaptPrune(prior_sigma=2.0).prior(cells((1, 5)))
    assert prior[0].tolist() == pytest.approx([exp(-d * d / 8) for d in (2, 1, 0, 1, 2)])
    even = AdaptPrune().prior(cells((24, 24))).view(24, 24)
    assert (even == 1).sum() == 4
    assert even[0, 0] == pytest.approx(0.3686, abs=1e-4)


def test_without_damping_attention_and_prior_decide():
    attention = [0.30, 0.25, 0.20, 0.15, 0.10]
    assert pick(flat(visual_token_num=3, distance_limit=0), attention, torch.eye(5), (1, 5)) == [
        0,
        1,
        2,
    ]
    centred = AdaptPrune(visual_token_num=3, distance_limit=0, prior_sigma=1.0)
    assert pick(centred, attention, torch.eye(5), (1, 5)) == [2, 1, 3]


def test_a_similar_neighbour_is_damped():
    keys = torch.eye(4)[[0, 0, 1, 2]]
    pruner = flat(visual_token_num=3)
    # 1 - exp(-1 / 4.5) = 0.2 is left of the copy beside the first pick
    assert pick(pruner, [0.4, 0.3, 0.1, 0.2], keys, (1, 4)) == [0, 3, 2]
    assert pick(pruner, [0.4, 0.3, 0.1, 0.2], torch.eye(4), (1, 4)) == [0, 1, 3]


def test_a_copy_beyond_the_limit_is_not_damped():
    keys = torch.eye(3)[[0, 1, 2, 0]]
    near, far = (
        flat(visual_token_num=2, distance_limit=3),
        flat(visual_token_num=2, distance_limit=2),
    )
    near.distance_sigma = far.distance_sigma = 100.0
    assert pick(near, [0.4, 0.1, 0.2, 0.3], keys, (1, 4)) == [0, 2]
    assert pick(far, [0.4, 0.1, 0.2, 0.3], keys, (1, 4)) == [0, 3]


def test_damping_stays_inside_a_grid():
    keys = torch.ones(4, 2)
    assert pick(flat(visual_token_num=2), [0.4, 0.1, 0.3, 0.0], keys, (1, 2), (1, 2)) == [0, 2]
    assert pick(flat(visual_token_num=2), [0.4, 0.3, 0.1, 0.0], keys, (1, 2), (1, 2)) == [0, 2]


def test_tokens_without_any_score_are_picked_in_order_and_only_once():
    assert pick(flat(visual_token_num=4), [0.0] * 4, torch.ones(4, 2), (2, 2)) == [0, 1, 2, 3]


def test_what_pads_an_image_is_never_picked_however_narrow_the_prior():
    """Far from the middle a narrow prior is 0, and minus infinity times that is no number."""
    attention, keys = torch.tensor([[0.9, 0.8, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]]), torch.eye(9)
    narrow, real = AdaptPrune(prior_sigma=0.1), torch.arange(9)[None] >= 2
    assert narrow.prior(cells((1, 9)))[0, 0] == 0
    order = narrow.pick(attention, keys[None], cells((1, 9)), 3, real)
    assert order.tolist() == [[4, 5, 3]]


def test_the_picks_are_those_of_the_plain_loop():
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(48, generator=generator)
    keys = torch.randn(48, 3, generator=generator)
    pruner = AdaptPrune(visual_token_num=20, distance_limit=2, similarity_sigma=0.5)
    score = (pruner.prior(cells((6, 8)))[0] * attention).tolist()
    unit = torch.nn.functional.normalize(keys, dim=1)
    expected = []
    for _ in range(20):
        best = max((i for i in range(48) if i not in expected), key=lambda i: (score[i], -i))
        expected.append(best)
        for i in range(48):
            distance = (best // 8 - i // 8) ** 2 + (best % 8 - i % 8) ** 2
            if distance <= 4:
                unlike = 1 - float(unit[best] @ unit[i])
                score[i] *= 1 - exp(-distance / 4.5) * exp(-(unlike**2) / 0.5)
    assert pick(pruner, attention.tolist(), keys, (6, 8)) == expected


def test_a_ratio_keeps_that_share_rounded_down(model, sample):
    model.pruner = build_pruner("adaptprune", keep_ratio=0.1)
    assert model.pruner.token_schedule(36, 6) == [36] + [3] * 5
    with trace_pruning(model) as trace:
        model(sample(4, "image", 5).ids, images=sample(4, "image", 5).images)
    assert [int(n) for n in trace.visual_tokens] == [36] + [3] * 5


def test_a_ratio_of_nothing_drops_every_visual_token(model, sample):
    model.pruner = build_pruner("adaptprune", keep_ratio=0.0)
    prompt = sample(4, "image", 5)
    assert model.generate(prompt.ids, images=prompt.images, max_new_tokens=2).shape[0] == 1


def test_tiled_images_compete_across_overview_and_tiles(anyres_model, sample):
    model = anyres_model
    model.pruner = build_pruner("adaptprune", visual_token_num=50, layer=2)
    images = [torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))]
    prompt = sample(4, "image", 5)
    with trace_pruning(model) as trace:
        model(prompt.ids, images=images, image_sizes=[(SIDE, 2 * SIDE)])
    # an overview of 6 x 6, and 12 rows of 6 patches and a newline
    assert [int(n) for n in trace.visual_tokens] == [36 + 84] * 2 + [50] * 4


@pytest.mark.parametrize(
    "options",
    [{"keep_ratio": 1.1}, {"distance_limit": -1}, {"similarity_sigma": 0}, {"prior_sigma": 0}],
)
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ValueError, match="must"):
        AdaptPrune(**options)
