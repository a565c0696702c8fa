"""What a worker says about its methods, so that a menu can group and explain them."""

from __future__ import annotations

import pytest

from llava.pruning import METHODS, build_pruner
from llava.pruning.about import where_it_acts
from llava.serve.methods import BUDGET, MethodShelf, defaults, description, offer
from tests.golden_cases import SHIPPED
from tests.golden_checks.models import load_checkpoint


@pytest.fixture(scope="module")
def model():
    _, model, _ = load_checkpoint("tiny-llava-v1.5", SHIPPED / "llava-base")
    model.pruner = build_pruner("none")
    return model


@pytest.fixture(scope="module")
def listing(model):
    return {entry["name"]: entry for entry in offer(model, MethodShelf(model.pruner))}


def test_every_method_says_how_it_chooses_and_where_it_acts(listing):
    for name, method in METHODS.own.items():
        entry = listing[name]
        assert entry["about"] and entry["acts"] == where_it_acts(method)
        assert isinstance(entry["trained"], bool)


def test_what_a_budget_counts_is_that_of_this_decoder(model, listing):
    depth = model.config.num_hidden_layers
    layer = build_pruner("fastv", visual_token_num=9).token_schedule(576, depth).index(9)
    assert (listing["fastv"]["counts"], listing["fastv"]["from_layer"]) == ("later layers", layer)
    assert listing["vispruner"]["counts"] == "every layer"
    assert all(
        entry["counts"] is None
        for entry in listing.values()
        if BUDGET not in defaults(entry["name"])
    )


def test_a_method_that_cannot_run_here_is_described_all_the_same(model):
    class Shelf:
        def build(self, name, **options):
            raise ValueError("not here")

    said = description("fastv", model, Shelf())
    assert said["about"] and said["acts"] == "inside" and said["counts"] is None
