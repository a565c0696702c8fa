"""Values of options that are of another type than the option."""

import pytest

from llava.pruning import METHODS, build_pruner
from llava.pruning.base import option_names
from llava.pruning.option_types import check_choice, check_share, check_types


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
