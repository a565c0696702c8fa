"""Values of a method's own reach the decoder with their tokens, in every kind of call."""

from dataclasses import replace

import pytest
import torch

from llava.model.reuse import Picture, PrefixCache
from llava.pruning import DecoderStage, Pruner, VisionStage
from tests.conftest import SIDE, pad_batch
from tests.pruning.test_twigvlm import grown

GREEDY = dict(do_sample=False, max_new_tokens=3, eos_token_id=-1, pad_token_id=0)


def follow(prefill):
    """Raises where a token carries another value than its own."""
    patches, extras = prefill.patch_index, prefill.extras
    kept = patches >= 0
    assert extras["patch"].shape == (*patches.shape, 2) and extras["flag"].dtype == torch.bool
    assert torch.equal(extras["patch"][..., 0], torch.where(kept, patches % 36, 0))
    assert torch.equal(extras["patch"][..., 1], torch.where(kept, 7, 0))
    assert torch.equal(extras["flag"], kept)
    places = prefill.visual_index
    lengths = [[int((row == n).sum()) for n in range(int(row.max()) + 1)] for row in places]
    return lengths


class Marking(VisionStage, DecoderStage, Pruner):
    """Marks every patch with its number, every image with its length, and looks at them later."""

    name = "marking"

    def __init__(self):
        self.seen = []

    def after_encoder(self, vision):
        vision = vision.keep(torch.arange(1, 36, 2).expand(len(vision.features), -1))
        number = torch.stack([vision.positions, torch.full_like(vision.positions, 7)], dim=-1)
        flag = torch.ones_like(vision.positions, dtype=torch.bool)
        return replace(vision, extras={"patch": number, "flag": flag})

    def after_layout(self, image):
        return replace(image, image_extras={"length": len(image.patches)})

    def before_layer(self, index, prefill):
        lengths = follow(prefill)
        if index == 0:
            assert prefill.image_extras["length"] == lengths
            size = max(map(len, lengths))
            padded = [row + [0] * (size - len(row)) for row in lengths] if size else [[0]]
            assert prefill.image_values("length").tolist() == padded
            assert prefill.grids == [[(6, 6) if n else (0, 0) for n in row] for row in padded]
            self.seen.append(len(lengths))
        if index == 2:
            prefill = prefill.keep(~prefill.is_visual | (prefill.patch_index % 4 != 1))
        if index == 3:
            prefill = prefill.append(torch.ones(len(lengths), 1, prefill.hidden_states.shape[2]))
        return prefill


CALLS = {
    "greedy": ({}, [2]),
    "beams": (dict(num_beams=3), [6]),
    "several answers": (dict(do_sample=True, num_return_sequences=2), [4]),
    "without a cache": (dict(use_cache=False), [2, 2, 2]),
}


@pytest.mark.parametrize("name", CALLS)
def test_they_stay_with_their_tokens(model, sample, name):
    options, rows = CALLS[name]
    prompts = [sample(3, "image", 4, "image", 2, seed=1), sample(9, "image", 2, seed=2)]
    ids, mask = pad_batch([p.ids for p in prompts])
    images = torch.cat([p.images for p in prompts])
    model.pruner = pruner = Marking()
    model.generate(ids, images=images, attention_mask=mask, **{**GREEDY, **options})
    assert pruner.seen == rows


def test_a_prompt_without_images_has_zeros_and_no_numbers(model, sample):
    prompts = [sample(3, "image", 4, seed=1), sample(9, seed=2)]
    ids, mask = pad_batch([p.ids for p in prompts])
    model.pruner = pruner = Marking()
    model.generate(ids, images=prompts[0].images, attention_mask=mask, **GREEDY)
    assert pruner.seen == [2]


def test_newlines_have_zeros(anyres_model, sample):
    prompt = sample(3, "image", 4)
    anyres_model.pruner = pruner = Marking()
    crops = [torch.randn(3, 3, SIDE, SIDE)]
    sizes = [(SIDE, 2 * SIDE)]
    anyres_model.generate(prompt.ids, images=crops, image_sizes=sizes, **GREEDY)
    assert pruner.seen == [1]


def test_shared_beginnings_have_them(model, sample):
    model.pruner = pruner = Marking()
    first = sample(4, "image", seed=1).ids[0]
    prompts = [torch.cat([first, sample(n, seed=n).ids[0, 1:]]) for n in (9, 5)]
    picture, cache = Picture(torch.randn(3, SIDE, SIDE), (SIDE, SIDE)), PrefixCache(model)
    for _ in range(2):
        cache.generate(prompts, [[picture]] * 2, ["a"] * 2, **GREEDY)
    assert pruner.seen == [2, 2]


def test_guessed_tokens_have_zeros(model, sample):
    twig = grown(model)
    model.pruner = pruner = Marking()
    pruner.drafter = twig.drafter
    prompts = [sample(3, "image", 4, "image", 2, seed=1), sample(9, "image", 2, seed=2)]
    ids, mask = pad_batch([p.ids for p in prompts])
    model.generate(
        ids,
        images=torch.cat([p.images for p in prompts]),
        attention_mask=mask,
        generation_strategy="self_speculative",
        **GREEDY,
    )
    assert pruner.seen == [1, 1]


def test_blended_tokens_have_zeros(model, sample):
    class Blending(Marking):
        def before_layer(self, index, prefill):
            prefill = super().before_layer(index, prefill)
            if index != 4:
                return prefill
            blended = torch.ones(1, 2, prefill.hidden_states.shape[2])
            owner, real = torch.tensor([[0, 0]]), torch.tensor([[True, True]])
            return prefill.keep_and_append(prefill.index >= 0, blended, owner, real)

    prompt = sample(3, "image", 4)
    model.pruner = Blending()
    model.generate(prompt.ids, images=prompt.images, **GREEDY)
