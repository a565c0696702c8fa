"""Two methods in a row."""

import pytest
import torch

from llava.pruning import Chain, build_pruner, trace_pruning


def test_options_find_their_method_by_its_name():
    chain = build_pruner(
        "vispruner+fastv", vispruner_visual_token_num=192, fastv_visual_token_num=64, fastv_layer=3
    )
    assert isinstance(chain, Chain) and chain.name == "vispruner+fastv"
    assert chain.first == build_pruner("vispruner", visual_token_num=192)
    assert chain.second == build_pruner("fastv", visual_token_num=64, layer=3)


def test_the_second_starts_from_what_the_first_leaves():
    chain = build_pruner(
        "downsample+fastv", downsample_visual_token_num=128, fastv_ratio=0.5, fastv_layer=1
    )
    assert chain.token_schedule(576, 3) == [121, 60, 60]
    assert chain.token_schedule(576, 3, crops=5) == [125, 62, 62]


def test_tokens_that_crops_cannot_share_equally_are_all_there_for_the_second():
    """DivPrune chooses from all crops at once."""
    chain = build_pruner("divprune+fastv", divprune_visual_token_num=12, fastv_visual_token_num=11)
    assert chain.left_by_first(36, 6, 4) == (3, 4)
    assert chain.left_by_first(36, 6, 5) == (12, 1)
    assert chain.token_schedule(36, 6, 5)[0] == 12


def test_methods_without_weights_bring_no_module():
    assert build_pruner("random+fastv").module is None


def test_the_first_alone_decides_what_enters_the_decoder(model, sample):
    prompt = sample(4, "image", 5)

    def entering(pruner):
        model.pruner = pruner
        with trace_pruning(model, embeds=True) as trace:
            model.generate(prompt.ids, images=prompt.images, max_new_tokens=1)
        return trace

    alone = entering(build_pruner("vispruner", visual_token_num=12))
    chain = build_pruner(
        "vispruner+fastv",
        vispruner_visual_token_num=12,
        fastv_visual_token_num=5,
        fastv_layer=2,
    )
    both = entering(chain)
    assert torch.equal(both.visual_embeds[0], alone.visual_embeds[0])
    assert [int(count) for count in both.visual_tokens] == [12, 12, 5, 5, 5, 5]


def test_the_first_may_act_inside_the_decoder_by_a_setting_that_is_off(model, sample):
    options = dict(sinkpruner_visual_token_num=10, fastv_visual_token_num=4, fastv_layer=2)
    with pytest.raises(ValueError, match="first method .*: set sinkpruner_text_pruner=False$"):
        build_pruner("sinkpruner+fastv", **options)
    model.pruner = build_pruner("sinkpruner+fastv", sinkpruner_text_pruner=False, **options)
    prompt = sample(4, "image", 5)
    with trace_pruning(model) as trace:
        model.generate(prompt.ids, images=prompt.images, max_new_tokens=1)
    counts = [int(count) for count in trace.visual_tokens]
    assert counts == model.pruner.token_schedule(36, 6) and counts[2:] == [4, 4, 4, 4]


def test_nuwa_before_the_decoder_says_what_to_set(model):
    with pytest.raises(ValueError, match='first method .*: set nuwa_stage2="off"$'):
        build_pruner("nuwa+fastv")
    options = dict(nuwa_visual_token_num=10, fastv_visual_token_num=4, fastv_layer=2)
    chain = build_pruner("nuwa+fastv", nuwa_stage2="off", **options)
    model.pruner = chain
    assert chain.decoder is chain.second


def test_what_each_needs_is_asked_for():
    chain = build_pruner("visionzip+adaptprune")
    assert chain.vision.needs == build_pruner("visionzip").needs
    assert chain.vision.anyres_config == {"mm_patch_merge_type": "spatial"}
    assert chain.decoder.reads_text and not chain.adaptive


def test_weights_of_both_are_registered(model):
    plain = set(model.state_dict())
    model.pruner = build_pruner(
        "cdpruner+fastv", cdpruner_visual_token_num=10, fastv_visual_token_num=4
    )
    assert any("pruner_module.cdpruner.text" in name for name in model.state_dict())
    model.pruner = build_pruner("none")
    assert set(model.state_dict()) == plain


def test_a_second_budget_above_the_first_is_an_error_at_load_time(model):
    with pytest.raises(ValueError, match="fastv, on the 10 tokens that vispruner leaves: .*64"):
        model.pruner = build_pruner("vispruner+fastv", vispruner_visual_token_num=10)


@pytest.mark.parametrize(
    "name, message",
    [
        ("fastv+vispruner", "fastv acts inside the decoder"),
        ("vispruner+divprune", "divprune does not act inside the decoder alone"),
        ("vispruner+nuwa", "nuwa does not act inside the decoder alone"),
        ("vispruner+none", "none does not act inside the decoder alone"),
        ("vispruner+nope", "unknown pruning method 'nope'"),
        ("vispruner+fastv+fastv", "METHOD\\+METHOD"),
        ("vispruner+vispruner", "METHOD\\+METHOD"),
    ],
)
def test_what_does_not_fit_together_is_an_error(name, message):
    with pytest.raises(ValueError, match=message):
        build_pruner(name)


def test_an_option_of_neither_method_is_an_error():
    with pytest.raises(ValueError, match="must start with vispruner_ or fastv_"):
        build_pruner("vispruner+fastv", visual_token_num=64)
    with pytest.raises(ValueError, match="unknown option 'budget' for pruning method 'fastv'"):
        build_pruner("vispruner+fastv", fastv_budget=64)
