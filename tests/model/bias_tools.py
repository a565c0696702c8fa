"""What the tests of biases of attention share: answers, and the ways to get them."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from llava.model.language_model import attention
from llava.model.reuse import Picture, PrefixCache
from llava.pruning import DecoderStage
from tests.conftest import SIDE, pad_batch

GREEDY = dict(do_sample=False, max_new_tokens=5, eos_token_id=-1, pad_token_id=0)


class CutCaches(DecoderStage):
    """Takes tokens out of the caches of layers that ran, before layer 3."""

    def before_layer(self, index, prefill):
        odd = prefill.is_visual & (prefill.patch_index % 2 == 1)
        return prefill.keep(~odd) if index == 3 else prefill

    def pruned_caches(self, index, num_layers):
        return range(index if index == 3 else 0)

    def reusable_layers(self, prefill):
        return 3


def third_patches(pruner, vision):
    """(B, K) every third patch, as many as the budget of `pruner`."""
    size, device = vision.features.shape[1], vision.features.device
    places = torch.arange(0, size, 3, device=device)[: pruner.num_keep(vision)]
    return places.expand(len(vision.features), -1)


def with_backend(model, backend):
    model.config._attn_implementation = backend
    for layer in model.model.layers:
        layer.self_attn.backend = backend


def answers(model, prompt, **options):
    """(tokens (B, n), scores (B, n, V)) of `prompt`, which has ids and images."""
    out = model.generate(
        prompt.ids,
        images=prompt.images,
        output_scores=True,
        return_dict_in_generate=True,
        **{**GREEDY, **options},
    )
    return out.sequences, torch.stack(out.scores, dim=1)


def assert_same(found, wanted):
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], atol=1e-4, rtol=1e-4)


def as_batch(prompts, side="right"):
    """(ids, mask, images) of prompts of several lengths."""
    ids, mask = pad_batch([prompt.ids for prompt in prompts], side)
    return ids, mask, torch.cat([p.images for p in prompts if p.images is not None])


def assert_rows_are_those_of_each(model, prompts, side="right"):
    """Answers of a batch are those of its prompts; (tokens, scores) of the batch."""
    ids, mask, images = as_batch(prompts, side)
    tokens, scores = answers(model, SimpleNamespace(ids=ids, images=images), attention_mask=mask)
    for row, prompt in enumerate(prompts):
        own = answers(model, prompt)
        assert_same((tokens[row], scores[row]), (own[0][0], own[1][0]))
    return tokens, scores


def assert_beams_are_those_of_each(model, prompts, beams, cacheless=True):
    """cacheless: whether they are those without a cache, too"""
    ids, mask, images = as_batch(prompts)
    options = {**GREEDY, "num_beams": beams}
    out = model.generate(ids, images=images, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt.ids, images=prompt.images, **options)
        assert torch.equal(out[row], alone[0])
        if cacheless:
            slow = model.generate(prompt.ids, images=prompt.images, use_cache=False, **options)
            assert torch.equal(slow, alone)


def assert_shared_beginnings_change_nothing(model, sample, two_images: bool) -> PrefixCache:
    """Three questions that begin alike, asked twice, answer as each alone."""
    cache = PrefixCache(model)
    pictures = [Picture(sample("image", seed=n).images[0], (SIDE, SIDE)) for n in (1, 2)]
    first = sample(4, "image", seed=1).ids[0]
    prompts = [torch.cat([first, sample(n, seed=n).ids[0, 1:]]) for n in (5, 9, 3)]
    own = [pictures[n % 2 if two_images else 0] for n in range(3)]
    for _ in range(2):
        out = cache.generate(
            prompts,
            [[image] for image in own],
            ["why"] * 3,
            output_scores=True,
            return_dict_in_generate=True,
            **GREEDY,
        )
    scores = torch.stack(out.scores, dim=1)
    for row, (prompt, image) in enumerate(zip(prompts, own, strict=True)):
        alone = answers(model, SimpleNamespace(ids=prompt[None], images=image.pixels[None]))
        assert_same((out.sequences[row], scores[row]), (alone[0][0], alone[1][0]))
    return cache


class NotesAttention:
    """Notes the last token's attention in layer 1: as foretold, of a branch, and as recorded."""

    def before_layer(self, index, prefill):
        if index == 1:
            self.seen.append(prefill.next_attention())
            _, row = prefill.decoder.branch(prefill, prefill.decoder.layers[1:2])
            alone = prefill.decoder.branch_attention(prefill, prefill.decoder.layers[1:2])
            assert torch.equal(alone, row)
            self.seen.append(row[:, :, 0].mean(dim=1))
        if index == 2:
            self.seen.append(prefill.attention[:, :, -1].mean(dim=1))
        return prefill


def assert_noted_attention_is_the_same(model, prompt, without) -> None:
    """`model` prunes by a method that notes attention; without(method) takes away its bias."""
    seen = model.pruner.seen = []
    answers(model, prompt)
    torch.testing.assert_close(seen[1], seen[0])
    torch.testing.assert_close(seen[2], seen[0])
    without(model.pruner)
    answers(model, prompt)
    assert not torch.allclose(seen[0], seen[3], atol=1e-4)


def assert_guesses_change_nothing(model, prompt, nodes, all_right):
    """all_right: whether every guess must be accepted"""
    options = {**GREEDY, "max_new_tokens": 12}
    plain = model.generate(prompt.ids, images=prompt.images, **options)
    fast = model.generate(
        prompt.ids,
        images=prompt.images,
        generation_strategy="self_speculative",
        return_dict_in_generate=True,
        tree_nodes=nodes,
        **options,
    )
    assert torch.equal(plain, fast.sequences)
    assert not all_right or fast.logs[0].acceptance_rate == 1


def watched_masks(monkeypatch) -> list:
    """The mask of every attention from here on that PyTorch's kernel computes."""
    masks, plain = [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        masks.append(attn_mask)
        return plain(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    return masks
