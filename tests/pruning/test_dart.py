"""DART: pivots, turns and budgets, on inputs small enough to check by hand."""

import pytest
import torch

from llava.pruning import Prefill, build_pruner, trace_pruning
from llava.pruning.dart import least_alike
from tests.conftest import SIDE, make_pruner
from tests.golden_checks.dart import prompts_of


def prompt(states, sizes, start: int, count: int) -> Prefill:
    """One row with an image of `count` tokens at `start`; sizes are the L1 norms of keys."""
    states, sizes = torch.tensor(states).float()[None], torch.tensor(sizes).float()
    return prompts_of(states, sizes[None, :, None], start, count)


def taken(prefill: Prefill, budget: int, **options) -> list[int]:
    """Places in the prompt of the visual tokens in the order in which they are taken."""
    pruner = build_pruner("dart", visual_token_num=budget, key_states="input", **options)
    prefill.image_extras = {"budget": [[budget]]}
    score = pruner.score(prefill)[0]
    order = score.argsort(descending=True, stable=True)
    return order[: int((score > 0).sum())].tolist()


RIGHT, UP, LEFT = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]


def test_the_token_that_resembles_the_pivot_least_is_taken_next():
    states = [UP, RIGHT, RIGHT, UP, LEFT, UP]
    prefill = prompt(states, [9, 1, 4, 2, 3, 5], start=1, count=4)
    assert taken(prefill, 3, pivot_image_token=1, pivot_text_token=0) == [2, 4, 3]


def test_words_behind_the_image_are_pivots_and_those_before_it_are_not():
    states = [RIGHT, RIGHT, LEFT, UP, RIGHT, LEFT]
    prefill = prompt(states, [99, 9, 1, 2, 1, 4], start=1, count=4)
    # The visual pivot takes what points away from it, the word what points away from the word.
    one_each = dict(pivot_image_token=1, pivot_text_token=1)
    assert taken(prefill, 3, **one_each) == [1, 2, 4]


def test_without_words_visual_pivots_do_it_alone():
    prefill = prompt([UP, RIGHT, LEFT, UP], [1, 9, 1, 2], start=1, count=3)
    assert taken(prefill, 2) == [1, 3]


def test_equal_tokens_are_taken_in_order():
    prefill = prompt([UP] * 7, [1, 1, 1, 1, 1, 1, 7], start=1, count=5)
    assert taken(prefill, 3, pivot_image_token=1) == [1, 2, 3]


@pytest.mark.parametrize(("budget", "kept"), [(64, 68), (128, 132), (192, 196), (3, 4), (576, 576)])
def test_the_rule_of_the_release_keeps_a_few_more(budget, kept):
    released = build_pruner("dart", visual_token_num=budget, rule="released")
    assert released.token_schedule(576, 32) == [576] * 2 + [kept] * 30
    exact = build_pruner("dart", visual_token_num=budget)
    assert exact.token_schedule(576, 32) == [576] * 2 + [budget] * 30


def test_images_with_budgets_of_their_own_are_chosen_from_together():
    alike = torch.rand(3, 8, 20)
    pivots = torch.rand(3, 20).argsort(dim=1)[:, :4]
    count, words = torch.tensor([[20], [7], [2]]), torch.tensor([[4], [1], [0]])
    turn = least_alike(alike, pivots, count, words)
    for group in range(3):
        one = slice(group, group + 1)
        alone = least_alike(alike[one], pivots[one], count[one], words[one])
        assert torch.equal(turn[one], alone)
        assert sorted(turn[group].tolist())[: count[group]] == list(range(count[group]))
        assert (turn[group] < 20).sum() == count[group]


def test_an_image_of_llava_next_keeps_the_share_of_a_full_one(anyres_model, sample):
    anyres_model.pruner = make_pruner("dart", 90)  # of 5 x 36
    images = [torch.randn(3, 3, SIDE, SIDE)]
    with trace_pruning(anyres_model) as trace:
        anyres_model.generate(
            sample(4, "image", 5).ids, images=images, image_sizes=[(42, 84)], max_new_tokens=1
        )
    length = int(trace.visual_tokens[0][0])
    assert length < 150 and int(trace.visual_tokens[-1][0]) == round(90 * length / 180)


@pytest.mark.parametrize("key_states", ["input", "output"])
def test_pivots_have_the_largest_keys_of_the_layer_before(model, sample, key_states):
    """Those that it made, or would make of what it gives."""
    prompt = sample(3, "image", 8)
    states = model(prompt.ids, images=prompt.images, output_hidden_states=True).hidden_states
    x = states[1 if key_states == "input" else 2]
    size = model.model.layer_keys(1, x, torch.arange(x.shape[1])[None])[0].abs().sum(dim=(0, 2))
    model.pruner = build_pruner("dart", visual_token_num=4, layer=2, key_states=key_states)
    with trace_pruning(model) as trace:
        model.generate(prompt.ids, images=prompt.images, max_new_tokens=1, do_sample=False)
    kept = trace.decoder_keep[2][0]
    assert kept[4:8].tolist() == (size[4:40].topk(4).indices.sort().values + 4).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "greedy"}, "unknown rule 'greedy', choose from exact, released"),
        ({"key_states": "both"}, "unknown key_states 'both', choose from output, input"),
        ({"pivot_image_token": 0}, "must be at least 1"),
        ({"layer": 0}, "must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_pruner("dart", **options)
