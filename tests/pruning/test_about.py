"""What the class of a method says of it: where it acts, whether it is trained, what is counted."""

import pytest

from llava.pruning import METHODS, build_pruner
from llava.pruning.about import (
    AT_MOST,
    AVERAGE,
    EVERY_LAYER,
    LATER_LAYERS,
    how_it_chooses,
    is_trained,
    what_budget_counts,
    where_it_acts,
)


@pytest.mark.parametrize(
    "name, where, trained",
    [
        ("none", "nowhere", False),
        ("vispruner", "before", False),
        ("fastv", "inside", False),
        ("vscan", "both", False),
        ("twigvlm", "inside", True),
    ],
)
def test_where_a_method_acts_follows_from_the_hooks_it_fills(name, where, trained):
    assert where_it_acts(METHODS[name]) == where
    assert is_trained(METHODS[name]) == trained


@pytest.mark.parametrize(
    "name, counted",
    [
        ("vispruner", (EVERY_LAYER, None)),
        ("fastv", (LATER_LAYERS, 2)),
        ("pyramiddrop", (AVERAGE, None)),
        ("twigvlm", (AVERAGE, None)),
        ("glimpseprune", (AT_MOST, None)),
    ],
)
def test_what_a_budget_counts_follows_from_the_tokens_of_the_layers(name, counted):
    assert what_budget_counts(build_pruner(name, visual_token_num=192), 576, 32) == counted


@pytest.mark.parametrize("name", METHODS.own)
def test_how_a_method_chooses_is_a_phrase(name):
    said = how_it_chooses(METHODS[name])
    assert said and not said.endswith(".") and "\n" not in said
