"""The method in use: what a call goes by, and what belongs to the model."""

import copy
import threading

import pytest
import torch
from safetensors.torch import load_file

from llava.pruning import Pruner, VisionStage, build_pruner, trace_pruning

CALLS = {
    "forward": lambda model, prompt: model(prompt.ids, images=prompt.images),
    "generate": lambda model, prompt: model.generate(
        prompt.ids, images=prompt.images, do_sample=False, max_new_tokens=2
    ),
}


class Assigning(VisionStage, Pruner):
    """Keeps everything, and assigns another method to the model when it sees an image."""

    name = "assigning"

    def __init__(self, model, other):
        self.model, self.other = model, other

    def after_encoder(self, vision):
        self.model.pruner = self.other
        return vision


@pytest.mark.parametrize("call", CALLS)
def test_a_method_that_is_assigned_meanwhile_counts_from_the_next_call(model, sample, call):
    model.pruner = Assigning(model, build_pruner("fastv", visual_token_num=10))
    seen = []
    for _ in range(2):
        with trace_pruning(model) as trace:
            CALLS[call](model, sample(4, "image", 5))
        seen.append(int(trace.visual_tokens[-1][0]))
    assert seen == [36, 10]


def test_calls_with_methods_of_their_own_do_not_see_each_other(model):
    assigned = model.pruner = build_pruner("random", visual_token_num=9)
    events, seen = [threading.Event() for _ in range(3)], {}

    def first():
        with model.using(build_pruner("random", visual_token_num=1)):
            events[0].set()
            events[1].wait(9)
            seen["first"] = model.pruner.visual_token_num
        events[2].set()

    def second():
        events[0].wait(9)
        with model.using(build_pruner("random", visual_token_num=2)):
            events[1].set()
            events[2].wait(9)
            seen["second"] = model.pruner.visual_token_num

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    seen["outside"] = model.pruner.visual_token_num
    for thread in threads:
        thread.join()
    assert seen == {"first": 1, "second": 2, "outside": 9} and model.pruner is assigned


def test_what_is_used_for_a_block_is_that_of_one_model(model, anyres_model):
    own = model.pruner
    with model.using(build_pruner("random", visual_token_num=3)):
        with anyres_model.using(build_pruner("random", visual_token_num=5)):
            found = model.pruner.visual_token_num, anyres_model.pruner.visual_token_num
        assert found == (3, 5) and anyres_model.pruner.name == "none"
        assert copy.deepcopy(model).pruner.name == "none"
    assert model.pruner is own


def test_given_weights_are_saved_without_those_of_the_method(model, tmp_path):
    class Trained(Pruner):
        name, module = "trained", torch.nn.Linear(2, 2)

    model.pruner = Trained()
    weights = model.state_dict()
    assert "pruner_module.weight" in weights
    model.save_pretrained(tmp_path, state_dict=weights)
    assert not any("pruner" in name for name in load_file(tmp_path / "model.safetensors"))
    assert "pruner_module.weight" in weights  # those of the caller stay as they were
