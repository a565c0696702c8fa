"""Questions about one image share work, and get the answers that they get alone."""

import pytest
import torch

from llava.model.reuse import Picture, PrefixCache
from llava.pruning import METHODS, trace_pruning
from tests.conftest import SIDE, make_pruner

GREEDY = dict(do_sample=False, max_new_tokens=6, eos_token_id=-1)
CHAINS = ["vispruner+fastv", "pool+pyramiddrop"]


@pytest.fixture(params=[*sorted(METHODS), *CHAINS])
def pruner(request):
    return make_pruner(request.param)


def picture(seed, size=(SIDE, SIDE), crops=None):
    shape = (3, SIDE, SIDE) if crops is None else (crops, 3, SIDE, SIDE)
    return Picture(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), size)


def prompts_about(sample, *lengths, images=1):
    """Prompts with the same beginning and text of these lengths behind the image."""
    first = sample(4, *["image"] * images, seed=1).ids[0]
    return [torch.cat([first, sample(n, seed=n).ids[0, 1:]]) for n in lengths]


def alone(model, prompt, pictures, question, **kwargs):
    pixels = [p.pixels for p in pictures]
    with trace_pruning(model) as trace:
        out = model.generate(
            prompt[None],
            images=torch.stack(pixels) if pixels else None,
            image_sizes=[p.size for p in pictures],
            questions=[question] * len(pictures) if pictures else None,
            output_scores=True,
            return_dict_in_generate=True,
            **{**GREEDY, **kwargs},
        )
    return out.sequences[0], out.scores[0][0], trace


def shared(model, cache, prompts, pictures, questions, **kwargs):
    with trace_pruning(model) as trace:
        out = cache.generate(
            prompts,
            pictures,
            questions,
            output_scores=True,
            return_dict_in_generate=True,
            **{**GREEDY, **kwargs},
        )
    return out.sequences, out.scores[0], trace


def check(model, prompts, pictures, questions, batches):
    cache = PrefixCache(model)
    for batch in batches:
        own = [[x[i] for i in batch] for x in (prompts, pictures, questions)]
        tokens, logits, trace = shared(model, cache, *own)
        for row, case in enumerate(zip(*own, strict=True)):
            own_tokens, own_logits, own_trace = alone(model, *case)
            assert torch.equal(tokens[row], own_tokens)
            torch.testing.assert_close(logits[row], own_logits, atol=1e-4, rtol=1e-4)
            for layer in range(6):
                assert trace.kv_lengths[layer][row] == own_trace.kv_lengths[layer][0]
                assert trace.visual_tokens[layer][row] == own_trace.visual_tokens[layer][0]


def test_questions_about_one_image_get_the_answers_they_get_alone(model, pruner, sample):
    model.pruner = pruner
    prompts = prompts_about(sample, 5, 9, 3, 2, 12)
    questions = ["a cat", "two dogs", "is it red", "why", "how many"]
    check(model, prompts, [[picture(0)]] * 5, questions, [[0, 1, 2], [3, 4]])


def test_images_and_beginnings_may_mix_in_a_batch(model, pruner, sample):
    model.pruner = pruner
    a, b = picture(1), picture(2)
    prompts = [
        *prompts_about(sample, 5, 9),
        sample(12, "image", 1, seed=5).ids[0],
        *prompts_about(sample, 3, 2, images=2),
        sample("image", "image", seed=6).ids[0],
    ]
    pictures = [[a], [b], [a], [a, b], [b, a], [a, a]]
    check(model, prompts, pictures, ["what", "who"] * 3, [[0, 1, 2], [3, 4, 5], [0, 5, 3]])
