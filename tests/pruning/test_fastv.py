"""FastV on inputs small enough to check by hand."""

import pytest
import torch

from llava.pruning import Prefill, trace_pruning
from llava.pruning.fastv import FastV


def prefill(row, visual):
    """One prompt whose last token attends as in `row`; `visual` is the image of every token."""
    size = len(row)
    places = torch.arange(size)[None]
    return Prefill(
        decoder=None,
        layer=2,
        hidden_states=torch.zeros(1, size, 4),
        position_ids=places,
        visual_index=torch.tensor([visual]),
        patch_index=places,
        index=places,
        valid=None,
        attention=torch.tensor(row)[None, None, None],
    )


def kept(pruner, row, visual):
    state = prefill(row, visual)
    return state.keep_visual(pruner.score(state), pruner.visual_token_num)


def test_the_most_attended_image_tokens_survive_and_text_always_does():
    state = kept(FastV(visual_token_num=2), [0.0, 0.1, 0.4, 0.2, 0.3, 0.0], [-1, 0, 0, 0, 0, -1])
    assert state.index.tolist() == [[0, 2, 4, 5]]
    assert state.position_ids.tolist() == [[0, 2, 4, 5]]  # positions keep their gaps


def test_equal_attention_goes_to_the_earlier_token():
    state = kept(FastV(visual_token_num=2), [0.2] * 5, [-1, 0, 0, 0, -1])
    assert state.index.tolist() == [[0, 1, 2, 4]]


def test_every_image_has_its_own_budget():
    state = kept(FastV(visual_token_num=1), [0.0, 0.1, 0.2, 0.5, 0.4, 0.0], [-1, 0, 0, 1, 1, -1])
    assert state.index.tolist() == [[0, 2, 3, 5]]


def test_a_ratio_removes_that_share_of_the_tokens(model, sample):
    prompt = sample(3, "image", 4)
    model.pruner = pruner = FastV(ratio=0.75, layer=3)
    with trace_pruning(model) as trace:
        model.generate(prompt.ids, images=prompt.images, max_new_tokens=1, do_sample=False)
    assert [int(n) for n in trace.visual_tokens] == [36, 36, 36, 9, 9, 9]
    assert pruner.token_schedule(36, 6) == [36, 36, 36, 9, 9, 9]


def test_a_share_is_that_of_every_image_of_its_own():
    pruner = FastV(visual_token_ratio=0.5)
    assert pruner.by_share and not FastV(visual_token_num=4).by_share
    assert [pruner.left_of(count) for count in (4, 10)] == [2, 5]


def test_a_ratio_leaves_one_token_at_least():
    assert [FastV(ratio=0.9).left_of(count) for count in (1, 4, 10, 20)] == [1, 1, 1, 2]


def test_the_cut_follows_the_depth_unless_it_is_given():
    assert FastV().token_schedule(576, 32) == [576] * 2 + [64] * 30
    assert FastV().cut_layer(40) == 2
    assert FastV(layer=3).cut_layer(40) == 3


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"ratio": -0.1}, {"layer": 0}])
def test_options_out_of_range_are_errors(options):
    with pytest.raises(ValueError, match="must"):
        FastV(**options)
