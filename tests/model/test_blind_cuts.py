"""Tokens that a method drops without a look at them do not finish the layer before."""

import pytest
import torch

from llava.pruning import build_pruner, trace_pruning
from tests.conftest import make_pruner


def finishing(model, prompt, layer: int) -> tuple[list[int], list[int]]:
    """(tokens that went through the feed-forward part of `layer`, tokens that entered each layer)
    while a prompt ran."""
    seen: list[int] = []
    part = model.model.layers[layer].mlp
    hook = part.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[-2]))
    try:
        with trace_pruning(model) as trace:
            model.generate(prompt.ids, images=prompt.images, do_sample=False, max_new_tokens=1)
    finally:
        hook.remove()
    return seen, [int(tokens[0]) for tokens in trace.prompt_tokens]


@pytest.mark.parametrize("name", ["fastv", "nuwa"])
def test_only_what_stays_finishes_the_layer_before_the_cut(model, sample, name):
    model.pruner = make_pruner(name)
    cut = model.pruner.decoder.blind_cuts(6)[0]
    seen, entered = finishing(model, sample(4, "image", 5), cut - 1)
    assert seen == [entered[cut]] and entered[cut] < entered[cut - 1]


def test_a_method_that_looks_at_states_gets_those_of_all_tokens(model, sample):
    model.pruner = build_pruner("adaptprune", visual_token_num=10, layer=2)
    seen, entered = finishing(model, sample(4, "image", 5), 1)
    assert seen == [entered[1]] and entered[2] < entered[1]


def test_a_layer_that_is_watched_or_replaced_runs_as_a_whole(model, sample, monkeypatch):
    model.pruner = build_pruner("fastv", visual_token_num=10, layer=2)
    prompt, layer = sample(4, "image", 5), model.model.layers[1]
    hook = layer.register_forward_hook(lambda *_: None)
    seen, entered = finishing(model, prompt, 1)
    hook.remove()
    assert seen == [entered[1]]
    monkeypatch.setattr(layer, "forward", layer.forward)
    assert finishing(model, prompt, 1)[0] == [entered[1]]
    monkeypatch.undo()
    assert finishing(model, prompt, 1)[0] == [entered[2]]


def test_gradients_reach_what_was_dropped_as_before(model, sample):
    """Training runs layers as a whole, as its checkpoints do."""
    model.pruner = build_pruner("fastv", visual_token_num=10, layer=2)
    prompt, seen = sample(4, "image", 5), []
    hook = model.model.layers[1].mlp.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].shape[-2])
    )
    with torch.enable_grad():
        model(prompt.ids, images=prompt.images)
    hook.remove()
    assert seen == [prompt.ids.shape[1] - 1 + 36]
