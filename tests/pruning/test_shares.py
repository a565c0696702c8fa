"""A share of an image's tokens as budget, on models whose images have one size."""

import pytest

from llava.pruning import METHODS, VisionStage, build_pruner, trace_pruning
from llava.pruning.base import option_names

SHARED = [name for name in METHODS.own if "visual_token_ratio" in option_names(METHODS[name])]
PUBLISHED = {0.111: 64, 0.222: 128, 0.333: 192}


def test_all_methods_with_a_number_of_tokens_take_a_share():
    budgets = {name for name in METHODS.own if "visual_token_num" in option_names(METHODS[name])}
    # label of published thresholds, a cap, and a number that is only one of three ways
    assert budgets - set(SHARED) == {"mustdrop", "glimpseprune", "prumerge"}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("share", PUBLISHED)
def test_a_share_is_scheduled_as_the_number_it_comes_to(name, share):
    number = build_pruner(name, visual_token_num=PUBLISHED[share])
    method = build_pruner(name, visual_token_ratio=share)
    assert method.token_schedule(576, 32) == number.token_schedule(576, 32)
    method.check(576, 32)


@pytest.mark.parametrize(
    ("name", "share"), [("vispruner", 0.25), ("fastv", 0.25), ("divprune", 0.01), ("pool", 1.0)]
)
def test_a_model_of_one_image_size_makes_it_a_number(model, sample, name, share):
    model.pruner = build_pruner(name, visual_token_ratio=share)
    wanted = max(1, round(share * 36))
    assert model.pruner.visual_token_num == wanted and model.pruner.visual_token_ratio is None
    with trace_pruning(model) as trace:
        model.generate(sample(4, "image", 5).ids, images=sample("image").images, max_new_tokens=1)
    assert int(trace.visual_tokens[-1][0]) == wanted


def test_on_llava_next_it_is_a_share_of_all_crops(anyres_model):
    anyres_model.pruner = build_pruner("vispruner", visual_token_ratio=0.25)
    assert anyres_model.pruner.visual_token_num == 45  # of 5 x 36


def test_both_methods_of_a_combination_take_one(model):
    options = {"vispruner_visual_token_ratio": 0.5, "fastv_visual_token_ratio": 0.5}
    model.pruner = build_pruner("vispruner+fastv", **options)
    assert [method.visual_token_num for method in model.pruner.methods] == [18, 9]


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("number", [0, -1, 2.5, True, "64"])
def test_a_budget_that_is_no_number_of_tokens_is_refused(name, number):
    says = f"visual_token_num .{number!r}. must be a whole number of at least 1 token"
    with pytest.raises(ValueError, match=says):
        build_pruner(name, visual_token_num=number)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("share", [0, -1, 1.5, float("nan"), True])
def test_a_share_outside_of_0_to_1_is_refused(name, share):
    with pytest.raises(ValueError, match="visual_token_ratio .* must lie above 0 and up to 1"):
        build_pruner(name, visual_token_ratio=share)


def test_tokens_to_retain_are_a_budget_like_any_other():
    assert build_pruner("sparsevlm", retained_tokens=96).visual_token_num == 96
    with pytest.raises(ValueError, match=r"visual_token_num \(96\) and visual_token_ratio"):
        build_pruner("sparsevlm", retained_tokens=96, visual_token_ratio=0.3)


def test_a_decoder_without_room_for_the_cuts_is_refused_before_any_image():
    with pytest.raises(ValueError, match=r"layer \(0\) must be at least 1 and below the 1 dec"):
        build_pruner("fastv").check_depth(1)
    with pytest.raises(ValueError, match=r"layer_list \(0, 1, 2\) must stay below the 2"):
        build_pruner("pyramiddrop").check_depth(2)


def test_a_method_shows_the_budget_that_counts():
    number, share = build_pruner("fastv"), build_pruner("fastv", visual_token_ratio=0.222)
    assert repr(number).startswith("FastV(visual_token_num=64, layer=None")
    assert repr(share).startswith("FastV(") and "visual_token_ratio=0.222" in repr(share)
    assert "visual_token_ratio" not in repr(number) and "visual_token_num" not in repr(share)


@pytest.mark.parametrize("name", SHARED)
def test_a_share_of_a_video_is_that_of_every_pair_of_its_frames(name):
    """Before the decoder; inside it tokens are chosen from the video as a whole."""
    pruner = build_pruner(name, visual_token_ratio=0.25)
    video, pair = pruner.with_budget_of(3 * 131, 3), pruner.with_budget_of(131)
    assert pair.visual_token_num == 33
    if not isinstance(pruner, VisionStage):
        assert video.visual_token_num == 98 == pruner.with_budget_of(3 * 131).visual_token_num
        return
    assert video.visual_token_num == 99  # not 98, 32 for each
    assert video.for_part(3).visual_token_num == 33
