"""What a tower lacks for a method: refused when it is assigned, with what there is instead."""

import re

import pytest

from llava.pruning import METHODS, Pruner, SelectPruner, VisionStage, build_pruner
from llava.pruning.cues import check_cues, names_for
from llava.pruning.testing.tiny import make_own_grids_model, picture
from tests.conftest import make_pruner
from tests.pruning.test_contract_own_grids import REFUSED


@pytest.fixture(scope="module")
def own_grids():
    return make_own_grids_model()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refusal_names_what_is_needed_what_there_is_and_what_works(own_grids, name):
    with pytest.raises(ValueError) as refused:
        own_grids.pruner = make_pruner(name)
    said = str(refused.value)
    assert re.match(rf"{name} needs '\w+' \(.*\), which the vision tower of Qwen2.5-VL does", said)
    assert f"(it gives {', '.join(sorted(own_grids.visual.provides))})" in said
    works = ", ".join(method for method in METHODS.own if method not in REFUSED)
    assert f"choose another method ({works}), or" in said


def test_what_works_is_what_can_be_assigned(own_grids, model):
    for tower, owner in ((own_grids.visual, own_grids), (model.get_vision_tower(), model)):
        for name in names_for(tower, METHODS.own.values()):
            owner.pruner = make_pruner(name)
        owner.pruner = build_pruner("none")
    assert names_for(model.get_vision_tower(), METHODS.own.values()) == list(METHODS.own)


def test_a_method_is_not_named_among_those_that_work_where_it_does_not(make_model):
    model = make_model(s2=True, s2_scales="84,168", mm_hidden_size=48)
    with pytest.raises(ValueError, match="glimpseprune needs 'output'") as refused:
        model.pruner = make_pruner("glimpseprune")
    assert "sparsevlm, " in str(refused.value) and "glimpseprune" not in str(refused.value)[12:]


def test_a_setting_that_does_without_is_named_and_works(own_grids):
    with pytest.raises(ValueError, match="set theta=0 for diversity alone, choose another method"):
        own_grids.pruner = build_pruner("cdpruner", visual_token_num=5)
    own_grids.pruner = build_pruner("cdpruner", visual_token_num=5, theta=0)
    (image,) = own_grids.image_tokens([picture(4, 9)], questions=["What is it?"])
    assert len(image.patches) == 5
    own_grids.pruner = build_pruner("none")


def test_methods_between_tower_layers_need_a_tower_that_lets_them(own_grids):
    class Between(VisionStage, Pruner):
        name = "between"

        def before_tower_layer(self, index, tokens):
            return tokens

    class BehindAsWell(Between):
        merges_blocks = True

    with pytest.raises(ValueError, match="between needs 'tower_tokens'"):
        check_cues(Between(), own_grids.visual)
    check_cues(BehindAsWell(), own_grids.visual)


def test_a_cue_that_no_tower_has_is_no_method_of_ours(own_grids):
    class Dreams(SelectPruner):
        name = "dreams"
        needs = frozenset({"depth_map"})

    with pytest.raises(ValueError, match=r"'depth_map' \(which no tower has\)"):
        own_grids.pruner = Dreams()
