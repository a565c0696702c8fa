"""What the tokens of an answer attend to on the prompt, one row each, with any method."""

import pytest
import torch

from llava.pruning import build_pruner, trace_pruning
from llava.pruning.base import DecoderPruner
from tests.conftest import make_pruner, pad_batch, with_random_parts

OPTIONS = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}


def traced(model, layers, ids, images, **more):
    with torch.inference_mode(), trace_pruning(model, attention=layers) as trace:
        answer = model.generate(ids, images=images, **OPTIONS, **more)
    return trace, answer


def test_rows_are_those_of_the_prompt_with_the_answer_behind_it(model, sample):
    prompt = sample(3, "image", 5)
    layers = list(range(model.config.num_hidden_layers))
    trace, answer = traced(model, layers, prompt.ids, prompt.images)
    size = trace.position_ids.shape[1]
    for count in range(4):
        ids = torch.cat([prompt.ids, answer[:, :count]], dim=1)
        with torch.inference_mode(), trace_pruning(model, attention=layers) as whole:
            model(ids, images=prompt.images)
        for layer in layers:
            (ours,) = trace.answer_image_attention(layer)[count]
            (wanted,) = whole.image_attention(layer)
            torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)
            if count:
                ours = trace.answer_attention[layer][count - 1]
                wanted = whole.attention[layer][..., :size]
                torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)
    assert len(trace.answer_attention[0]) == 3  # the last token is followed by none


def seen(trace, layer: int) -> list[int]:
    """Places of the prompt that the second token of an answer could look at."""
    return trace.answer_attention[layer][0][0].sum(dim=0).nonzero()[:, 0].tolist()


def test_tokens_that_left_a_layer_get_nothing_there(model, sample):
    prompt = sample(3, "image", 5)
    model.pruner = DecoderPruner(visual_token_num=5, layer=2)
    trace, _ = traced(model, [0, 1, 2, -1], prompt.ids, prompt.images)
    size, last = trace.position_ids.shape[1], model.config.num_hidden_layers - 1
    kept = trace.decoder_keep[2][0].tolist()
    assert seen(trace, 0) == seen(trace, 1) == list(range(size))
    assert seen(trace, 2) == seen(trace, last) == kept and len(kept) == size - 36 + 5


@pytest.mark.parametrize("name", ["glimpseprune", "mustdrop"])
def test_tokens_that_left_the_caches_later_get_nothing(name, model, sample):
    prompt = sample(3, "image", 5)
    if name == "glimpseprune":
        model.pruner = with_random_parts(build_pruner(name, ref_boxes=[[0, 0, 0.3, 0.3]]))
    else:
        model.pruner = make_pruner(name)
    layers = list(range(model.config.num_hidden_layers))
    trace, _ = traced(model, layers, prompt.ids, prompt.images)
    last = trace.decoder_keep[max(trace.decoder_keep)][0]
    kept = sorted(place for place in last.tolist() if place >= 0)
    assert seen(trace, layers[-1]) == kept
    lengths = [int(length) for length in trace.kv_lengths]
    for layer in layers:
        places = seen(trace, layer)
        assert len(places) <= lengths[layer] and set(kept) <= set(places)
    if name == "glimpseprune":  # it drops from all layers
        assert all(seen(trace, layer) == kept for layer in layers)


def test_rows_of_a_batch_are_those_of_its_prompts(model, sample):
    model.pruner = DecoderPruner(visual_token_num=5, layer=2)
    prompts = [sample(3, "image", 5), sample(9, "image", 2, seed=1)]
    ids, mask = pad_batch([prompt.ids for prompt in prompts])
    images = torch.cat([prompt.images for prompt in prompts])
    together, _ = traced(model, [1, 3], ids, images, attention_mask=mask)
    for number, prompt in enumerate(prompts):
        alone, _ = traced(model, [1, 3], prompt.ids, prompt.images)
        for layer in (1, 3):
            for ours, wanted in zip(
                together.answer_image_attention(layer),
                alone.answer_image_attention(layer),
                strict=True,
            ):
                torch.testing.assert_close(ours[number], wanted[0], atol=1e-5, rtol=1e-4)


def test_tokens_that_come_together_have_a_row_each(model, sample):
    prompt, more = sample(3, "image", 5), torch.tensor([[7, 11, 4]])
    with torch.inference_mode(), trace_pruning(model, attention=[1]) as together:
        out = model(prompt.ids, images=prompt.images, use_cache=True)
        model(more, past_key_values=out.past_key_values)
    with torch.inference_mode(), trace_pruning(model, attention=[1]) as alone:
        out = model(prompt.ids, images=prompt.images, use_cache=True)
        for token in more[0]:
            model(token[None, None], past_key_values=out.past_key_values)
    rows = torch.cat(alone.answer_attention[1], dim=0)
    assert rows.shape[0] == 3
    torch.testing.assert_close(
        torch.cat(together.answer_attention[1], dim=0).flatten(), rows.flatten()
    )


def test_nothing_is_recorded_unless_asked_for(model, sample):
    prompt = sample(3, "image", 5)
    trace, _ = traced(model, [], prompt.ids, prompt.images)
    assert not trace.answer_attention and not trace.held
