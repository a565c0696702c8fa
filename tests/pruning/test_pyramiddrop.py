"""PyramidDrop: schedules, and one stage by hand."""

import pytest
import torch

from llava.pruning import trace_pruning
from llava.pruning.pyramiddrop import PyramidDrop


def test_the_published_setting_averages_270_tokens():
    schedule = PyramidDrop().token_schedule(576, 32)
    assert schedule == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert sum(schedule) / 32 == 270


def test_the_published_layers_follow_the_depth():
    assert PyramidDrop().cut_layers(576, 40) == (10, 20, 30)
    assert PyramidDrop(layer_list=[8, 16, 24]).cut_layers(576, 40) == (8, 16, 24)


@pytest.mark.parametrize("budget", [270, 192, 128, 64, 32])
@pytest.mark.parametrize("depth", [6, 32, 40])
def test_a_budget_is_the_average_over_the_layers(budget, depth):
    pruner = PyramidDrop(visual_token_num=budget)
    pruner.check(576, depth)
    schedule = pruner.token_schedule(576, depth)
    assert budget - 1.5 < sum(schedule) / depth <= budget
    assert schedule == sorted(schedule, reverse=True) and schedule[-1] >= 1


def test_counts_are_truncated_and_counted_from_all_tokens():
    pruner = PyramidDrop(layer_list=[1, 2], image_token_ratio_list=[0.3333, 0.2])
    assert pruner.token_schedule(576, 4) == [576, 191, 115, 115]


def test_images_of_one_prompt_are_cut_by_their_own_shares(model, sample):
    model.pruner = PyramidDrop(layer_list=[2, 4], image_token_ratio_list=[0.5, 0.25])
    prompt = sample(3, "image", 4, "image", 2)
    with trace_pruning(model) as trace:
        model.generate(prompt.ids, images=prompt.images, max_new_tokens=1, do_sample=False)
    assert [int(n) for n in trace.visual_tokens] == [72, 72, 36, 36, 18, 18]
    first = trace.decoder_keep[2][0]
    assert ((first >= 4) & (first < 40)).sum() == ((first >= 44) & (first < 80)).sum() == 18


def test_a_stage_keeps_what_the_layer_to_come_attends_to(model, sample):
    prompt = sample(3, "image", 4)
    states = model(prompt.ids, images=prompt.images, output_hidden_states=True).hidden_states
    positions = torch.arange(states[2].shape[1])[None]
    last = positions[:, -1:]
    row = model.model.attention_rows(2, states[2], positions, last, None)[0, :, 0].mean(dim=0)
    best = row[4:40].argsort(descending=True, stable=True)[:9].sort().values + 4
    model.pruner = PyramidDrop(layer_list=[2], image_token_ratio_list=[0.25])
    with trace_pruning(model) as trace:
        model.generate(prompt.ids, images=prompt.images, max_new_tokens=1, do_sample=False)
    kept = trace.decoder_keep[2][0]
    assert torch.equal(kept[(kept >= 4) & (kept < 40)], best)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"visual_token_num": 64, "image_token_ratio_list": [0.5]}, "give one of them"),
        (
            {"visual_token_ratio": 0.2, "image_token_ratio_list": [0.5]},
            "visual_token_ratio .0.2. and",
        ),
        ({"layer_list": [8], "image_token_ratio_list": [0.5, 0.2]}, "one entry per cut"),
        ({"layer_list": [8, 8, 9]}, "ascending"),
        ({"image_token_ratio_list": [0.5, 0.6, 0.1]}, "must not rise"),
        ({"image_token_ratio_list": [1.2, 0.6, 0.1]}, "at most 1"),
        ({"image_token_ratio_list": [0.5, 0.1, 0.0]}, "above 0"),
        ({"layer_list": [-1, 8, 9]}, "from 0 on"),
    ],
)
def test_options_that_contradict_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        PyramidDrop(**options)


def test_a_stage_may_drop_nothing():
    plan = PyramidDrop(image_token_ratio_list=[1.0, 0.5, 0.5]).token_schedule(576, 32)
    assert plan == [576] * 16 + [288] * 16


def test_what_the_first_layers_alone_exceed_is_refused():
    with pytest.raises(ValueError, match="cannot be met with a first cut at layer 16"):
        PyramidDrop(visual_token_num=64, layer_list=[16]).check(576, 32)
    with pytest.raises(ValueError, match="below the 6 decoder layers"):
        PyramidDrop(layer_list=[8, 16, 24]).check(576, 6)
