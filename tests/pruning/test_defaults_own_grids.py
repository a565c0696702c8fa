"""What a method is by default on Qwen2.5-VL: as published for it, else as on LLaVA by its depth."""

import pytest
import torch

from llava.model.multimodal_encoder.qwen2_5_vl_encoder import (
    Qwen2_5_VLVisionConfig,
    Qwen2_5_VLVisionTower,
)
from llava.pruning import METHODS, build_pruner
from llava.pruning.testing.tiny import make_own_grids_model
from tests.conftest import make_pruner
from tests.pruning.test_contract_own_grids import REFUSED

#: decoder layers of the released models
DEPTHS = {"7B": 28, "3B": 36}
#: layers that see fewer tokens than the one before
CUTS = {
    "fastv": {28: [2], 36: [2]},
    "adaptprune": {28: [2], 36: [2]},
    "dart": {28: [2], 36: [2]},
    "pyramiddrop": {28: [7, 14, 21], 36: [9, 18, 27]},
    "sparsevlm": {28: [3, 6, 14], 36: [3, 8, 18]},
    "mustdrop": {28: [3, 6, 10, 13], 36: [3, 8, 12, 17]},
    "twigvlm": {28: [2, 21], 36: [2, 24]},
    "twigvlm_plus": {28: [2, 21], 36: [2, 24]},
    "v2drop": {28: [3, 15, 19], 36: [3, 19, 25]},
    "tops": {28: [13, 17], 36: [16, 22]},
    "sinkpruner": {28: [2, 5, 13], 36: [2, 7, 17]},
    "vscan": {28: [14], 36: [18]},
    "nuwa": {28: [15], 36: [19]},
}
#: layers of the tower that tell something about attention
TOWER = {"hiprune": {15, 31}, "vscan": {7}, "mustdrop": {31}}
#: as published for Qwen2.5-VL, of 1000 tokens: those in front of the decoder, behind the last cut
SETTINGS = [
    ("vscan", {"image_token_ratio": 0.167, "cut_ratio_list": [0.333]}, 167, 55),
    ("vscan", {"image_token_ratio": 0.6, "cut_ratio_list": [0.67]}, 600, 402),
    ("vscan", {"visual_token_ratio": 0.111}, 166, 56),
    ("nuwa", {"visual_token_ratio": 0.25}, 350, 147),
    ("nuwa", {"visual_token_ratio": 0.5}, 600, 396),
    ("nuwa", {"visual_token_ratio": 0.75}, 850, 595),
    ("hiprune", {"visual_token_ratio": 0.334}, 334, 334),
    ("hiprune", {"visual_token_ratio": 0.112}, 112, 112),
    ("visionzip", {"visual_token_ratio": 0.5}, 500, 500),
    ("visionzip", {"visual_token_ratio": 0.111}, 111, 111),
    ("divprune", {"subset_ratio": 0.098}, 98, 98),
    ("sinkpruner", {"visual_token_ratio": 0.333}, 501, 250),
    ("sinkpruner", {"visual_token_ratio": 0.111}, 251, 60),
]


@pytest.fixture(scope="module")
def tower():
    small = dict(hidden_size=16, intermediate_size=8, num_heads=2, out_hidden_size=8, patch_size=2)
    return Qwen2_5_VLVisionTower(Qwen2_5_VLVisionConfig(depth=32, window_size=16, **small))


@pytest.fixture(scope="module")
def model():
    return make_own_grids_model()


def assigned(model, pruner):
    model.pruner = pruner
    model.pruner = build_pruner("none")
    return pruner


def test_every_method_that_cuts_in_the_decoder_is_here():
    inside = {name for name in METHODS.own if build_pruner(name).decoder.name != "none"}
    assert inside - REFUSED - {"glimpseprune"} == CUTS.keys()  # its trained part says where


@pytest.mark.parametrize("depth", DEPTHS.values(), ids=DEPTHS)
@pytest.mark.parametrize("name", CUTS)
def test_the_layers_of_cuts(model, name, depth):
    pruner = assigned(model, make_pruner(name, 192))
    if name == "sparsevlm":
        found = [layer + 1 for layer in pruner.stage_layers(depth)]
    elif name == "mustdrop":
        found = [layer + 1 for layer in pruner.stage_layers(depth)]
    else:
        if name == "pyramiddrop":
            pruner = build_pruner(name)
        schedule = pruner.token_schedule(1000, depth)
        found = [n for n in range(1, depth) if schedule[n] < schedule[n - 1]]
    assert found == CUTS[name][depth]


@pytest.mark.parametrize("name", TOWER)
def test_the_layers_of_the_tower_that_see_whole_images(model, tower, name):
    wanted = assigned(model, build_pruner(name)).tower_extras(*tower.depth)
    assert {layer for layer in tower._sources(wanted)} == TOWER[name]


@pytest.mark.parametrize(("name", "options", "first", "last"), SETTINGS)
def test_published_shares(model, name, options, first, last):
    pruner = assigned(model, build_pruner(name, **options))
    schedule = pruner.with_budget_of(1000).token_schedule(1000, 28)
    assert (schedule[0], schedule[-1]) == (first, last)


def test_visionzip_merges_a_twentieth():
    """The benchmarks of its release keep shares of 0.45 and 0.061 and merge into 0.05."""
    for share, dominant in ((0.5, 450), (0.111, 61)):
        pruner = build_pruner("visionzip", visual_token_ratio=share).with_budget_of(1000)
        assert pruner.counts(1000, 1, classless=True) == (dominant, 50)


def test_the_neighbours_of_hiprune_are_those_of_the_grid_of_tokens():
    pruner = build_pruner("hiprune")
    assert pruner.alpha == 0.1
    found = pruner.with_neighbours(torch.tensor([[20]]), (4, 9))
    assert found.tolist() == [[20, 19, 21, 11, 29]]
