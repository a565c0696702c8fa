"""How many kernels a device is asked to run for every further token that a method picks."""

import pytest
import torch

from llava.eval.efficiency.launches import Launches
from llava.pruning import build_pruner
from llava.pruning.cdpruner import largest_volume
from llava.pruning.dart import least_alike
from llava.pruning.density_merge import merge
from llava.pruning.density_peaks import cluster
from llava.pruning.divprune import farthest_first
from llava.pruning.eadp import cover_relevant
from llava.pruning.idpruner import marginally_best
from llava.pruning.mmtok import cover_both
from llava.pruning.scope import cover_salient
from llava.pruning.sinkpruner import sanitize
from llava.pruning.tokens import ImageTokens
from llava.pruning.tops import preserve
from llava.pruning.vispruner import drop_duplicates
from tests.pruning import kernels

PICKS, MORE = 16, 24
TOKENS = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
WEIGHT = TOKENS[..., 0].abs() + 0.1


def launches(call, *args) -> int:
    with Launches() as mode:
        call(*args)
    return mode.count


def pick_by_volume(count: int) -> None:
    largest_volume(TOKENS, WEIGHT, count)


def pick_farthest(count: int) -> None:
    farthest_first(TOKENS, count)


def pick_and_damp(count: int) -> None:
    pruner = build_pruner("adaptprune", visual_token_num=count)
    place = torch.arange(64).expand(2, -1)
    side = torch.full_like(place, 8)
    cells = torch.stack([torch.zeros_like(place), place // 8, place % 8, side, side], dim=2)
    pruner.pick(TOKENS[..., 0].softmax(dim=1), TOKENS, cells, count)


def drop_one_by_one(count: int) -> None:
    drop_duplicates(TOKENS, torch.arange(64).expand(2, -1), 64 - count, 1)


def pick_salient(count: int) -> None:
    cover_salient(TOKENS, WEIGHT, count, False)


def pick_salient_by_sum(count: int) -> None:
    cover_salient(TOKENS, WEIGHT, count, True)


def pick_relevant(count: int) -> None:
    cover_relevant(TOKENS, WEIGHT, count)


def pick_for_words_and_patches(count: int) -> None:
    cover_both(TOKENS, TOKENS, TOKENS[:, :16], WEIGHT[:, :16], count, 0.02, 0.2, 0.5)


def pick_important_and_different(count: int) -> None:
    marginally_best(TOKENS, WEIGHT, count, 0.5)


def take_turns(count: int) -> None:
    alike = TOKENS[:, None, :, 0].expand(-1, count, -1)
    pivots = torch.arange(4).expand(2, -1)
    numbers = torch.full((2, 1), 60), torch.full((2, 1), count - 4)
    least_alike(alike, pivots, *numbers)


def pick_unlike(count: int) -> None:
    sanitize(TOKENS, TOKENS[..., 0], 1, 4, count, 1)


PICKING = [pick_by_volume, pick_farthest, pick_and_damp, drop_one_by_one, take_turns]
PICKING += [pick_salient, pick_salient_by_sum, pick_relevant, pick_for_words_and_patches]
PICKING += [pick_important_and_different, pick_unlike]


@pytest.mark.parametrize("pick", PICKING, ids=lambda f: f.__name__)
def test_a_further_pick_costs_at_most_six_kernels(pick):
    further = launches(pick, PICKS + MORE) - launches(pick, PICKS)
    assert 0 < further <= 6 * MORE


def test_merging_asks_for_as_many_kernels_whatever_the_budget():
    kept = torch.arange(2 * PICKS).view(1, -1).expand(2, -1)
    few, many = (launches(merge, TOKENS, kept[:, ::step], n, 1.0) for step, n in ((4, 2), (1, 24)))
    assert few == many <= 54  # five of them so that copies go by their places


def test_so_do_clusters_around_density_peaks():
    def clusters(count: int) -> int:
        real, numbers = torch.ones(2, 64, dtype=torch.bool), torch.full((2,), count)
        return launches(cluster, TOKENS, real, numbers, count)

    assert clusters(PICKS) == clusters(PICKS + MORE) <= 6 * PICKS


@pytest.mark.parametrize("by_mean", [False, True])
def test_a_pick_by_three_scaled_criteria_costs_ten(by_mean):
    """Two of them are scaled anew over what is left at every pick, each operation waiting for the
    one before: the last pick's distances are looked up, held against those of the others, summed,
    the worst is looked for, subtracted, the best looked for, divided by, all added, the most looked
    for. The tenth marks what is taken. No operation of torch does two of these and leaves what is
    kept as recorded, see docs/Methods.md."""
    real, weights = torch.ones(2, 64, dtype=torch.bool), torch.full((2, 2), 0.5)
    given = TOKENS, TOKENS[..., 0].abs(), real, weights
    few, many = (launches(preserve, *given, count, by_mean) for count in (PICKS, PICKS + MORE))
    assert many - few <= 10 * MORE


#: kernels beyond the plain model's until the first token, of models as deep as those of 7B
CHOOSING = {"glimpseprune": 390, "sparsevlm": 430, "mustdrop": 300, "sinkpruner": 310}
CHOOSING |= {"dart": 160, "v2drop": 60, "tops": 2400}


@pytest.mark.slow
def test_methods_with_many_stages_ask_for_no_more_kernels():
    model = kernels.deep_llava()
    # The first call of a process has a few more, for what is computed once.
    _, plain = (kernels.count(model, build_pruner("none")) for _ in range(2))
    for name, most in CHOOSING.items():
        more = kernels.count(model, kernels.pruner_of(name, 64)) - plain
        assert 0 < more <= most, f"{name}: {more}"


def test_what_computes_is_counted_and_views_are_not():
    x = torch.randn(4, 4)
    assert launches(lambda: x.t()[:, 1:].unsqueeze(0).expand(2, -1, -1)) == 0
    assert launches(lambda: (x + 1).argmax(dim=1).cumsum(0)) == 3


def sequence(seed: int) -> ImageTokens:
    places = torch.arange(40)
    embeds = torch.randn(40, 8, generator=torch.Generator().manual_seed(seed))
    return ImageTokens(embeds=embeds, patches=places, offsets=places, length=40)


def test_sequences_of_one_length_are_picked_from_together():
    pruner = build_pruner("divprune", visual_token_num=PICKS)
    images = [sequence(seed) for seed in range(4)]
    shorter = images[0].keep(slice(30))
    together = pruner.after_layouts([images[0], shorter, *images[1:]])
    for image, pruned in zip([images[0], shorter, *images[1:]], together, strict=True):
        assert torch.equal(pruned.patches, pruner.after_layout(image).patches)
    one, four = (launches(pruner.after_layouts, images[:count]) for count in (1, 4))
    assert four - one < PICKS
