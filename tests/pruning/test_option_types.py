"""Values of options that are of another type than the option."""

import json

import pytest

from llava.pruning import METHODS, build_pruner, trace_pruning
from llava.pruning.base import option_names
from llava.pruning.glimpseprune_modules import Glimpse, GlimpseConfig
from llava.pruning.learned import save_part
from llava.pruning.option_types import check_choice, check_share, check_types
from llava.pruning.twigvlm import grow_twig, save_twig


@pytest.mark.parametrize("name", METHODS.own)
def test_what_every_option_is_by_default_is_of_its_type(name):
    method = METHODS[name]
    fields = {option: method.__dataclass_fields__[option] for option in option_names(method)}
    check_types(method, {option: field.default for option, field in fields.items()})


@pytest.mark.parametrize(
    "name, option, value, wanted",
    [
        ("vispruner", "sink_ratio", "x", "a finite number"),
        ("scope", "alpha", "nan", "a finite number"),
        ("holov", "raster_order", "maybe", "true or false"),
        ("holov", "num_runs", 2.5, "a whole number"),
        ("v2drop", "keep_list", "abc", "a list, each a finite number"),
        ("pyramiddrop", "layer_list", [8, "b", 24], "a list, each a whole number"),
        ("scope", "alpha", None, "a finite number"),
        ("scope", "alpha", float("nan"), "a finite number"),
        ("v2drop", "keep_list", [float("inf"), 0.5, 0.1], "a list, each a finite number"),
        ("eadp", "quantile", None, "a finite number"),
        ("mmtok", "tau_v", None, "a finite number"),
        ("dart", "pivot_text_token", None, "a whole number"),
        ("restore", "calibrate_decode", None, "true or false"),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_is_possible(name, option, value, wanted):
    with pytest.raises(ValueError) as raised:
        build_pruner(name, **{option: value})
    assert str(raised.value) == f"{option} ({value!r}) must be {wanted}"


def test_values_that_mean_the_same_are_taken():
    assert build_pruner("scope", alpha=2).alpha == 2
    assert build_pruner("holov", raster_order=1).in_raster_order
    assert build_pruner("v2drop", keep_list=(288, 0.5, 1)).keep_list == (288, 0.5, 1)


def test_none_is_taken_where_it_means_something():
    assert build_pruner("mmtok", tau_t=None, visual_token_ratio=None).tau_t is None
    by_share = {"visual_token_num": None, "visual_token_ratio": 0.5}
    assert build_pruner("scope", **by_share) == build_pruner("scope", visual_token_ratio=0.5)


def test_an_option_that_takes_more_than_plain_values_is_left_to_its_method():
    boxes = [[0.1, 0.2, 0.45, 0.6]]
    assert build_pruner("glimpseprune", ref_boxes=boxes).ref_boxes == boxes


@pytest.mark.parametrize("name", ["+fastv", "restore+", "scope++fastv"])
def test_a_combination_names_all_of_its_methods(name):
    with pytest.raises(ValueError, match=r"a combination has the form METHOD\+METHOD, got"):
        build_pruner(name)


def test_choices_and_shares_are_checked():
    check_choice("rule", "exact", ("exact", "released"))
    with pytest.raises(ValueError, match="^unknown rule 'none', choose from exact, released$"):
        check_choice("rule", "none", ("exact", "released"))
    for share in (None, 0, 0.5, 1):
        check_share("alpha", share)
    with pytest.raises(ValueError, match=r"^alpha \(1.5\) must lie between 0 and 1$"):
        check_share("alpha", 1.5)


# --- options that a file brings -------------------------------------------------------------------


def rewritten(folder, **changes):
    """The folder of a trained part, its config changed."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"twig_K": "1"}, r"config.json: twig_K \('1'\) must be a whole number"),
        ({"twig_K": True}, r"config.json: twig_K \(True\) must be a whole number"),
        ({"twig_K": {}}, r"config.json: twig_K must be a whole number"),
        ({"final_wipe_layer": 3.5}, r"final_wipe_layer \(3.5\) must be a whole number"),
        ({"twig_T": 5}, "twig_T is 5, but the twig in .* has 2 layers"),
    ],
)
def test_what_the_config_of_a_twig_says_is_checked(model, tmp_path, change, message):
    save_twig(str(tmp_path), grow_twig(model, 1, 2).state_dict(), 1, "base")
    with pytest.raises(ValueError, match=message):
        model.pruner = build_pruner("twigvlm", twig=rewritten(tmp_path, **change))


def test_a_twig_has_at_least_one_layer():
    with pytest.raises(ValueError, match=r"twig_T \(0\) must be at least 1 layer"):
        build_pruner("twigvlm", twig_T=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduce_layer": 2.5}, r"reduce_layer \(2.5\) must be a whole number"),
        ({"selected_layers": 2}, r"selected_layers \(2\) must be a list, each a whole number"),
        ({"le_layers": "0"}, r"le_layers \('0'\) must be a list, each a whole number"),
        ({"use_attention_logits": "no"}, r"use_attention_logits \('no'\) must be true or false"),
        ({"attn_fuse_num_heads": 0}, r"attn_fuse_num_heads \(0\) must be at least 1"),
        ({"le_dropout_prob": 2}, r"le_dropout_prob \(2\) must lie between 0 and 1"),
        ({"reduce_threshold": "x"}, r"config.json: reduce_threshold \('x'\) must be a finite"),
        ({"reduce_threshold": 5}, r"config.json: reduce_threshold \(5\) must be from 0 to 1"),
        ({"max_remain_ratio": 0}, r"config.json: max_remain_ratio \(0\) must be above 0"),
        ({"min_remain_num": -3}, r"config.json: min_remain_num \(-3\) must not be negative"),
        ({"anchor_positions": ["zz"]}, r"config.json: anchor_positions \['zz'\] are unknown"),
    ],
)
def test_what_the_config_of_a_glimpse_says_is_checked(model, tmp_path, change, message):
    write_glimpse(model, tmp_path)
    with pytest.raises(ValueError, match=message):
        model.pruner = build_pruner("glimpseprune", new_modules=rewritten(tmp_path, **change))


def test_settings_of_a_glimpse_may_be_written_as_those_of_a_caller(model, tmp_path, sample):
    write_glimpse(model, tmp_path)
    values = {"anchor_positions": "tl,br", "max_remain_ratio": None, "reduce_threshold": 1}
    model.pruner = build_pruner("glimpseprune", new_modules=rewritten(tmp_path, **values))
    prompt = sample(4, "image", 5)
    with trace_pruning(model) as trace:
        model.generate(prompt.ids, images=prompt.images, do_sample=False, max_new_tokens=1)
    assert model.pruner.setting("anchor_positions") == ("tl", "br")
    assert {5, 5 + 35} <= set(trace.decoder_keep[max(trace.decoder_keep)][0].tolist())


def write_glimpse(model, folder):
    config = GlimpseConfig.for_model(
        model, attn_fuse_size=16, visual_cond_size=16, attn_fuse_num_heads=2
    )
    glimpse = Glimpse(config)
    glimpse.initialize()
    save_part(str(folder), "glimpseprune", glimpse.state_dict(), "base", **config.values())
