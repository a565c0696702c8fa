"""IDPruner on inputs small enough to check by hand."""

from dataclasses import dataclass

import pytest
import torch

from llava.pruning import build_pruner, trace_pruning
from llava.pruning.idpruner import IDPruner, marginally_best

IMPORTANCE = torch.tensor([[0.9, 1.0, 0.1, 0.5]])
FEATURES = torch.tensor([[[1.0, 0], [1, 0], [-1, 0], [0, 1]]])


def order(count, weight, features=FEATURES, importance=IMPORTANCE) -> list[int]:
    return marginally_best(features, importance, count, weight)[0].tolist()


def test_the_most_important_comes_first_then_what_differs():
    # imp = (0.89, 1, 0, 0.44); behind 1: 0.44 - 0.5, -0.5 + 0, 0 + 0.5 and 0.22 - 0
    assert order(4, 0.5) == [1, 2, 3, 0]


def test_the_weight_goes_from_importance_alone_to_difference_alone():
    assert order(4, 1.0) == [1, 0, 3, 2]
    assert order(4, 0.0) == [1, 2, 3, 0]


def test_the_same_importance_everywhere_is_farthest_first_from_the_first_token():
    assert order(3, 0.5, importance=torch.full((1, 4), 0.7)) == [0, 2, 3]


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_every_pick_is_the_best_of_those_left(weight):
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(1, 20, 6, generator=draw)
    importance = torch.rand(1, 20, generator=draw)
    unit = torch.nn.functional.normalize(features[0].double(), dim=-1)
    similarity = unit @ unit.T
    scaled = (importance - importance.min()) / (importance.max() - importance.min() + 1e-6)
    found = order(20, weight, features, importance)
    assert sorted(found) == list(range(20)) and found[0] == importance.argmax()
    for number, pick in enumerate(found[1:], start=1):
        score = {
            n: weight * float(scaled[0, n])
            - (1 - weight) * float(similarity[n, found[:number]].max())
            for n in set(range(20)) - set(found[:number])
        }
        assert score[pick] >= max(score.values()) - 1e-6


def test_a_scorer_of_ones_own_takes_the_place_of_attention(model, sample):
    @dataclass
    class LastFirst(IDPruner):
        name = "last_first"
        needs = frozenset()

        def importance(self, vision, rows):
            assert vision.salience is None
            return vision.positions[rows].float()

    model.pruner, prompt = LastFirst(visual_token_num=3, mmr_lambda=1.0), sample(4, "image", 5)
    with trace_pruning(model) as trace:
        model.generate(prompt.ids, images=prompt.images, max_new_tokens=1)
    assert trace.visual_positions[0].tolist() == [33, 34, 35]


def test_a_weight_outside_of_its_range_is_an_error():
    with pytest.raises(ValueError, match="mmr_lambda"):
        build_pruner("idpruner", mmr_lambda=1.5)
