"""Leaving out patches of very large norm, in every method that offers it."""

import pytest
import torch

from llava.pruning import METHODS, build_pruner, trace_pruning
from llava.pruning.base import option_names
from llava.pruning.sinks import SinkFilter, num_sinks, sinks
from llava.pruning.testing.tiny import picture
from llava.pruning.tokens import VisionTokens
from tests.conftest import SIDE, make_pruner

FILTERING = [name for name, method in METHODS.own.items() if issubclass(method, SinkFilter)]
ONE_TOKEN = dict(max_new_tokens=1, do_sample=False)


def test_methods_that_choose_by_the_class_token_offer_it():
    assert {"fastervlm", "vispruner", "visionzip", "hiprune", "tops"} <= set(FILTERING)
    assert all("sink_ratio" in option_names(METHODS[name]) for name in FILTERING)


@pytest.mark.parametrize("name", FILTERING)
def test_settings_that_differ_in_any_option_are_printed_differently(name):
    """Programs tell by it whether answers belong to the same run."""
    settings = [{}, {"sink_ratio": 0.01}, {"visual_token_num": 96}, {"visual_token_ratio": 0.25}]
    assert len({repr(build_pruner(name, **options)) for options in settings}) == len(settings)


def test_how_many_patches_are_sinks():
    assert [num_sinks(576, share) for share in (0, 0.01, 0.5)] == [0, 6, 288]
    assert num_sinks(100, 0.07) == 7  # and not 8, as 0.07 * 100 is in floats


def test_the_largest_norms_are_sinks_and_of_equal_ones_the_first():
    features = torch.tensor([[[3.0, 4.0], [0.0, 6.0], [5.0, 0.0], [1.0, 1.0]]])
    assert sinks(features, 3).tolist() == [[1, 0, 2]]


def large_in(places, count: int = 36) -> VisionTokens:
    """One crop of 6 x 6 patches whose patches at `places` are large, and attended to most."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, count, 8, generator=generator)
    salience = torch.rand(1, count, generator=generator)
    features[:, places] *= 20
    salience[:, places] += 1
    return VisionTokens(
        features,
        torch.arange(count).expand(1, -1),
        grid=(6, 6),
        salience=salience,
        keys=torch.randn(1, count, 8, generator=generator),
        cls_token=torch.zeros(1, 1, 8),
        layers={layer: {"attention_mean": salience} for layer in (0, 1)},
    )


@pytest.mark.parametrize("name", FILTERING)
def test_sinks_are_not_chosen_and_as_many_tokens_are_kept(name):
    places = [3, 4, 17, 30]
    given, pruner = large_in(places), make_pruner(name)
    plain = chosen(pruner, given)
    assert set(places) <= set(plain)
    filtered = chosen(make_pruner_with(name, 0.1), given)
    assert not set(places) & set(filtered) and len(filtered) == len(plain)
    known = [place for place in filtered if 0 <= place < 36]
    assert known == sorted(set(known))


def make_pruner_with(name: str, sink_ratio: float, budget: int = 10):
    pruner = make_pruner(name, budget)
    pruner.sink_ratio = sink_ratio
    return pruner


def chosen(pruner, given: VisionTokens) -> list[int]:
    """Places of the tokens behind the projector."""
    return pruner.after_projector(pruner.after_encoder(given)).positions[0].tolist()


@pytest.mark.parametrize("name", FILTERING)
def test_sinks_stay_where_the_budget_needs_them(model, sample, name):
    prompt = sample(4, "image", 5)
    counts = []
    for sink_ratio in (0.0, 0.5):
        model.pruner = make_pruner_with(name, sink_ratio, 30)
        with trace_pruning(model) as trace:
            model.generate(prompt.ids, images=prompt.images, **ONE_TOKEN)
        counts.append([int(tokens[0]) for tokens in trace.visual_tokens])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", FILTERING)
def test_it_works_on_tiles_and_on_images_of_any_size(anyres_model, own_grids_model, sample, name):
    ids = sample(4, "image", 5).ids
    pruner = make_pruner_with(name, 0.1, 50)
    anyres_model.pruner = pruner
    tiles = pruner.vision.anyres_tiles is not None
    crops, size = (5, (2 * SIDE, 2 * SIDE)) if tiles else (3, (42, 84))
    images = [torch.randn(crops, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))]
    kept = []
    for sink_ratio in (0.0, 0.1):
        anyres_model.pruner.sink_ratio = sink_ratio
        with trace_pruning(anyres_model) as trace:
            anyres_model.generate(ids, images=images, image_sizes=[size], **ONE_TOKEN)
        kept.append(trace.visual_positions[0])
    assert len(kept[0]) == len(kept[1]) and not torch.equal(*kept)
    own_grids_model.pruner = make_pruner_with(name, 0.1)
    with trace_pruning(own_grids_model) as trace:
        own_grids_model.generate(ids, images=[picture(4, 9)], **ONE_TOKEN)
    assert int(trace.visual_tokens[0][0]) == own_grids_model.pruner.token_schedule(36, 6)[0]


@pytest.mark.parametrize("name", FILTERING)
@pytest.mark.parametrize("sink_ratio", [-0.1, 1.0, True])
def test_a_share_that_leaves_nothing_is_refused(name, sink_ratio):
    with pytest.raises(ValueError, match="sink_ratio .* must lie between 0"):
        build_pruner(name, sink_ratio=sink_ratio)
