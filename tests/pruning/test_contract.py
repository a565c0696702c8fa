"""What every method in METHODS promises, and two in a row."""

import pytest

from llava.pruning import METHODS, build_pruner
from llava.pruning.random import Random
from llava.pruning.testing import MethodContract
from tests.conftest import make_pruner

CHAINS = ["vispruner+fastv", "pool+pyramiddrop"]


class TestEveryMethod(MethodContract):
    make = staticmethod(make_pruner)

    @pytest.fixture(params=[*sorted(METHODS), *CHAINS])
    def pruner(self, request):
        return make_pruner(request.param)


def test_an_unknown_method_or_option_lists_the_choices():
    with pytest.raises(ValueError, match="unknown pruning method 'xyz', choose from none, random"):
        build_pruner("xyz")
    with pytest.raises(
        ValueError, match="unknown option 'budget'.*visual_token_num, visual_token_ratio, seed"
    ):
        build_pruner("random", budget=3)
    with pytest.raises(ValueError, match="has no options"):
        build_pruner("none", visual_token_num=3)


class Asking(Random):
    """Cannot do without questions."""

    name = "asking"
    reads_question = True

    def select(self, vision):
        assert len(vision.questions) == len(vision.layouts or vision.features)
        return super().select(vision)


class TestAMethodThatNeedsQuestions(MethodContract):
    """It is given them by the contract."""

    method = "asking"

    @pytest.fixture(autouse=True)
    def table(self, monkeypatch):
        monkeypatch.setitem(METHODS.own, "asking", Asking)
