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
#: what a tower says of the attention of its class token, or in place of it
ATTENTION = {"salience", "cls_attention", "cls_query", "attention_mean"}


def looks_at_attention(name: str) -> bool:
    """Whether a method, with its defaults, asks a tower of 24 layers for such cues."""
    stage = build_pruner(name).vision
    cues = stage.needs.union(stage.wants, *stage.tower_extras(24, 22).values())
    return bool(ATTENTION & cues)


LOOKING = [name for name in METHODS.own if looks_at_attention(name)]


@pytest.mark.parametrize("name", LOOKING)
def test_a_method_that_looks_at_the_class_token_leaves_sinks_out_or_says_why_not(name):
    method = METHODS[name]
    if "sink_ratio" in option_names(method):
        return
    around = next((own for own in option_names(method) if own == "base"), None)
    with pytest.raises(ValueError) as error:
        build_pruner(name, sink_ratio=0.01)
    if around is None:
        said = str(error.value)
        assert said.startswith(f"{name} does not take sink_ratio: ") and len(said.split()) > 12
    else:  # a wrapper: the method in it takes the option
        assert build_pruner(f"{name}+fastervlm", fastervlm_sink_ratio=0.01).base.sink_ratio == 0.01


def test_so_do_all_that_the_mixin_is_for():
    assert set(FILTERING) <= set(LOOKING) and len(FILTERING) > 10
    assert all("sink_ratio" in option_names(METHODS[name]) for name in FILTERING)


@pytest.mark.parametrize("name", FILTERING)
def test_settings_that_differ_in_any_option_are_printed_differently(name):
    """Programs tell by it whether answers belong to the same run."""
    settings = [{}, {"sink_ratio": 0.01}, {"visual_token_num": 96}, {"visual_token_ratio": 0.25}]
    settings = [own for own in settings if own.keys() <= set(option_names(METHODS[name]))]
    assert len({repr(build_pruner(name, **options)) for options in settings}) == len(settings)


def test_how_many_patches_are_sinks():
    assert [num_sinks(576, share) for share in (0, 0.01, 0.5)] == [0, 6, 288]
    assert num_sinks(100, 0.07) == 7  # and not 8, as 0.07 * 100 is in floats


def test_the_largest_norms_are_sinks_and_of_equal_ones_the_first():
    features = torch.tensor([[[3.0, 4.0], [0.0, 6.0], [5.0, 0.0], [1.0, 1.0]]])
    assert sinks(features, 3).tolist() == [[1, 0, 2]]


def large_in(places, count: int = 36, scale: float = 20.0) -> VisionTokens:
    """One crop of 6 x 6 patches whose patches at `places` are large, and attended to most."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(1, count, 8, generator=generator)
    salience = torch.rand(1, count, generator=generator)
    features[:, places] *= scale
    salience[:, places] += 1
    keys = torch.randn(1, count, 8, generator=generator)
    keys[:, places] += 4
    told = dict(attention_mean=salience, salience=salience, output_mean=features, keys=keys)
    told |= dict(cls_query=torch.ones(1, 8), cls_key=torch.zeros(1, 8))
    return VisionTokens(
        features,
        torch.arange(count).expand(1, -1),
        grid=(6, 6),
        salience=salience,
        keys=keys,
        cls_token=torch.zeros(1, 1, 8),
        layers={layer: told for layer in (0, 1)},
    )


@pytest.mark.parametrize("name", FILTERING)
def test_sinks_are_not_chosen_and_as_many_tokens_are_kept(name):
    places = [3, 4, 17, 30]
    given = large_in(places)
    plain = chosen(make_pruner_with(name, 0.0), given)
    assert set(places) <= set(plain)
    filtered = chosen(make_pruner_with(name, 0.1), given)
    assert not set(places) & set(filtered) and len(filtered) == len(plain)
    known = [place for place in filtered if 0 <= place < 36]
    assert len(known) == len(set(known))


@pytest.mark.parametrize("name", FILTERING)
def test_what_sinks_hold_is_in_no_token(name):
    places, tokens = [3, 4, 17, 30], []
    for scale in (20, 40):
        pruner, given = make_pruner_with(name, 0.1), large_in(places, scale=scale)
        tokens.append(pruner.after_projector(pruner.after_encoder(given)).features)
    assert torch.equal(*tokens)


def make_pruner_with(name: str, sink_ratio: float, budget: int = 10):
    pruner = make_pruner(name, budget)
    if pruner.adaptive:
        pruner = build_pruner(name, visual_token_num=budget)
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
    pruner = make_pruner_with(name, 0.1, 30)
    if not pruner.vision.anyres:
        pytest.skip("defined for one crop per image")
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
def test_other_images_of_a_call_change_nothing(anyres_model, name):
    """With five crops and with three: how many sinks there may be follows from an image alone."""
    pruner = make_pruner_with(name, 0.6, 90)
    if not pruner.vision.anyres or pruner.vision.anyres_tiles is not None:
        pytest.skip("all images have as many crops")
    anyres_model.pruner = pruner
    five, three = ((2 * SIDE, 2 * SIDE), 5), ((SIDE, 2 * SIDE), 3)
    for seed in range(8):
        draw = torch.Generator().manual_seed(seed)
        given = [(torch.randn(n, 3, SIDE, SIDE, generator=draw), s) for s, n in (five, three)]
        kept = []
        for images in (given[:1], given):
            pixels, sizes = [image for image, _ in images], [size for _, size in images]
            tokens = anyres_model.image_tokens(pixels, sizes, ["what?"] * len(sizes))
            kept.append(tokens[0].patches)
        assert torch.equal(*kept)


@pytest.mark.parametrize("name", FILTERING)
@pytest.mark.parametrize("sink_ratio", [-0.1, 1.0, True])
def test_a_share_that_leaves_nothing_is_refused(name, sink_ratio):
    with pytest.raises(ValueError, match="sink_ratio .* must lie between 0"):
        build_pruner(name, sink_ratio=sink_ratio)
