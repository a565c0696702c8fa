"""V2Drop: its schedules, and what it drops."""

import pytest
import torch

from llava.pruning import build_pruner, trace_pruning
from llava.pruning.v2drop import V2Drop

ONE_TOKEN = dict(max_new_tokens=1, do_sample=False)


def test_the_published_setting_is_that_of_a_third_of_the_tokens():
    schedule = V2Drop(visual_token_num=192).token_schedule(576, 32)
    assert schedule == [576] * 3 + [288] * 14 + [144] * 5 + [1] * 10
    assert round(sum(schedule) / 32, 1) == 202.8
    share = V2Drop(visual_token_ratio=0.333).with_budget_of(131).token_schedule(131, 28)
    assert share == [131] * 3 + [65] * 12 + [32] * 4 + [1] * 9


@pytest.mark.parametrize("budget", [64, 128, 191, 200, 320, 500])
@pytest.mark.parametrize("depth", [32, 40])
def test_any_other_budget_is_the_average_over_the_layers(budget, depth):
    pruner = V2Drop(visual_token_num=budget)
    pruner.check(576, depth)
    schedule = pruner.token_schedule(576, depth)
    assert budget - 1.5 < sum(schedule) / depth <= budget
    assert schedule == sorted(schedule, reverse=True) and schedule[-1] >= 1


def test_what_cuts_leave_can_be_given_as_numbers_and_shares_of_what_is_left():
    layers = {"layer_list": [1, 2, 3]}
    numbers = V2Drop(keep_list=[300, 7, 0], **layers).token_schedule(576, 5)
    shares = V2Drop(keep_list=[0.5, 0.5, 1.0], **layers).token_schedule(576, 5)
    assert numbers == [576, 300, 7, 1, 1] and shares == [576, 288, 144, 144, 144]


def test_what_the_first_layers_alone_exceed_is_refused():
    with pytest.raises(ValueError, match=r"\(54\) is out of reach: all 576 tokens enter"):
        V2Drop(visual_token_num=54).check(576, 32)
    V2Drop(visual_token_num=54, layer_list=[1, 17, 22]).check(576, 32)


@pytest.mark.parametrize("length", [3, 8])
def test_what_the_layer_before_changed_least_goes(model, sample, length):
    """And it does not depend on the question."""
    prompt = sample(3, "image", length)
    states = model(prompt.ids, images=prompt.images, output_hidden_states=True).hidden_states
    change = (states[3] - states[2])[0, 4:40].norm(dim=-1)
    best = change.argsort(descending=True, stable=True)[:9].sort().values + 4
    model.pruner = V2Drop(layer_list=[3], keep_list=[9])
    with trace_pruning(model) as trace:
        model.generate(prompt.ids, images=prompt.images, **ONE_TOKEN)
    kept = trace.decoder_keep[3][0]
    assert torch.equal(kept[(kept >= 4) & (kept < 40)], best)
    assert len(kept) == 4 + 9 + length


def test_a_second_cut_goes_by_what_the_tokens_left_by_the_first_became(model, sample):
    prompt = sample(3, "image", 4)
    model.pruner = V2Drop(layer_list=[2, 3], keep_list=[0.5, 5])
    inputs = {}

    def note(layer, given):
        inputs.setdefault(layer.self_attn.layer_idx, given[0])

    hooks = [layer.register_forward_pre_hook(note) for layer in model.model.layers]
    with trace_pruning(model) as trace:
        model.generate(prompt.ids, images=prompt.images, **ONE_TOKEN)
    for hook in hooks:
        hook.remove()
    after = model.model.layers[2](inputs[2], model.model.prefill_step(step_of(model, trace)), None)
    change = (after[0] - inputs[2])[0, 4:22].norm(dim=-1)
    best = change.argsort(descending=True, stable=True)[:5].sort().values
    middle = trace.decoder_keep[2][0][4:22]
    assert torch.equal(trace.decoder_keep[3][0][4:9], middle[best])


def step_of(model, trace):
    """A prefill of the tokens that enter layer 2, where they stand."""
    kept = trace.decoder_keep[2]
    embeds = torch.zeros(1, len(kept[0]), model.config.hidden_size)
    return model.model.start(embeds, position_ids=trace.position_ids[:, kept[0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_list": [3, 4]}, "one entry per cut"),
        ({"layer_list": [0, 4, 5]}, "from 1 on"),
        ({"layer_list": [4, 4, 5]}, "ascending"),
        ({"keep_list": [0.5, 1.5, 1]}, "whole numbers of tokens, or shares"),
        ({"keep_list": [0.5, -1, 1]}, "whole numbers of tokens, or shares"),
    ],
)
def test_options_that_contradict_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        build_pruner("v2drop", **options)
    with pytest.raises(ValueError, match="must ascend below the 6 layers"):
        build_pruner("v2drop", layer_list=[3, 17, 22]).check_depth(6)
