"""A bias of attention by where tokens stand: the same in every way to run prompts and answers."""

import sys
import types
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llava.model.language_model import attention
from llava.model.language_model.attention import attend, attention_mask
from llava.model.language_model.layers import Rotary
from llava.model.position_bias import between, joined
from llava.model.reuse import Picture, PrefixCache
from llava.pruning import DecoderStage, VisionStage, build_pruner, trace_pruning
from llava.pruning.base import DecoderPruner, SelectPruner
from llava.pruning.position_bias import PositionBias
from llava.pruning.testing.tiny import picture
from llava.pruning.twigvlm import TwigVLM
from tests.conftest import SIDE, pad_batch
from tests.model.test_key_bias import with_backend
from tests.pruning.test_twigvlm import grown

GREEDY = dict(do_sample=False, max_new_tokens=5, eos_token_id=-1, pad_token_id=0)


@dataclass(frozen=True)
class Near(PositionBias):
    """Tokens look at those near them; strong enough to change answers."""

    strength: float = 4.0

    def __call__(self, closeness):
        return self.strength * closeness


class Placed(SelectPruner):
    """Keeps every third patch at its place."""

    name = "placed"
    position_policy = "grid"
    bias = Near()

    def select(self, vision):
        size, device = vision.features.shape[1], vision.features.device
        places = torch.arange(0, size, 3, device=device)[: self.num_keep(vision)]
        return places.expand(len(vision.features), -1)

    def after_layouts(self, images):
        return [replace(image, position_bias=self.bias) for image in images]


class PlacedWeighing(Placed):
    """Some of the tokens count for several, too."""

    name = "placed weighing"

    def after_encoder(self, vision):
        vision = super().after_encoder(vision)
        vision.extras["key_bias"] = (1 + vision.positions % 4).float().log()
        return vision


class PlacedPrompt(Placed):
    """Tokens of answers look at others without it."""

    name = "placed prompt"
    bias = Near(answers=False)


class PlacedCut(Placed, DecoderPruner):
    """Drops some more before layer 2, by a row of attention."""

    name = "placed cut"
    after_encoder = Placed.after_encoder
    reads_text = False

    def score(self, prefill):
        return -prefill.patch_index.float()

    def before_layer(self, index, prefill):
        if index != 2:
            return prefill
        return prefill.keep_visual(self.score(prefill), 7, renumber=True)


class PlacedCaches(DecoderStage, Placed):
    """Takes tokens out of the caches of layers that ran, before layer 3."""

    name = "placed caches"

    def before_layer(self, index, prefill):
        odd = prefill.is_visual & (prefill.patch_index % 2 == 1)
        return prefill.keep(~odd) if index == 3 else prefill

    def pruned_caches(self, index, num_layers):
        return range(index if index == 3 else 0)

    def reusable_layers(self, prefill):
        return 3


METHODS = [Placed(12), PlacedWeighing(12), PlacedPrompt(12), PlacedCut(12), PlacedCaches(12)]


@pytest.fixture(params=METHODS, ids=lambda method: method.name)
def method(request):
    return request.param


def answers(model, prompt, **options):
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


# --- what it is -----------------------------------------------------------------------------


@pytest.mark.parametrize("width, theta", [(16, 1e4), (128, 1e6)])
def test_directions_say_how_far_positions_are_turned_apart(width, theta):
    config = SimpleNamespace(hidden_size=width, num_attention_heads=1, rope_theta=theta)
    places = torch.tensor([[0, 1, 7, 300, 701]])
    own = Rotary(config).directions(places)
    apart = (places[0][:, None] - places[0]).abs().double()
    turns = theta ** (-torch.arange(0, width, 2).double() / width)
    wanted = (apart[..., None] * turns).cos().mean(dim=-1)
    torch.testing.assert_close(own[0] @ own[0].T, wanted.float(), atol=1e-5, rtol=0)


def test_on_several_axes_every_frequency_turns_with_its_own():
    config = SimpleNamespace(
        hidden_size=8,
        num_attention_heads=1,
        rope_scaling=dict(type="mrope", mrope_section=[2, 1, 1]),
    )
    places = torch.tensor([[[0, 0, 0], [0, 2, 5], [3, 3, 3]]])
    own = Rotary(config).directions(places)
    turns = 1e4 ** (-torch.arange(4).double() / 4)
    apart = places[0, 1] - places[0, 2]
    wanted = (apart[torch.tensor([0, 0, 1, 2])] * turns).cos().mean()
    assert float(own[0, 1] @ own[0, 2]) == pytest.approx(float(wanted), abs=1e-6)
    text = Rotary(SimpleNamespace(hidden_size=8, num_attention_heads=1)).directions(places[..., 0])
    torch.testing.assert_close(own[:, 2], text[:, 2])  # text has the same place on all axes


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("groups", [4, 2])
def test_kernels_add_a_number_for_every_pair(backend, groups):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 8), *torch.randn(2, 2, groups, 6, 8)
    pairs, keys = torch.randn(2, 6, 6), torch.randn(2, 6)
    bias = joined(keys, pairs)
    out = attend(q, k, v, attention_mask(None, bias, 6, q.dtype), backend)
    whole = [attention.repeat_heads(x, 4) for x in (k, v)]
    scores = q @ whole[0].transpose(2, 3) / 8**0.5 + (pairs + keys[:, None])[:, None]
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    wanted = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ whole[1]
    torch.testing.assert_close(out, wanted)
    last = attend(q[:, :, -1:], k, v, attention_mask(None, bias[:, -1:], 1, q.dtype), backend)
    torch.testing.assert_close(last, wanted[:, :, -1:])


def test_queries_that_do_not_ask_add_nothing():
    places = torch.randn(2, 3, 8)
    asking = torch.tensor([[True], [False]])
    bias = between(Near(), places, places, asking)
    torch.testing.assert_close(bias[0], 4 * (places[0] @ places[0].T))
    assert not bias[1].any()


# --- in all ways to run ---------------------------------------------------------------------


def test_it_changes_answers_and_holds_in_every_layer(model, sample, monkeypatch):
    prompt, masks, plain = sample(3, "image", 5), [], F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        masks.append(attn_mask)
        return plain(q, k, v, attn_mask=attn_mask, **options)

    model.pruner = Placed(12)
    with_bias = answers(model, prompt)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(Placed, "bias", None)
    without = answers(model, prompt)
    assert all(mask is None for mask in masks)
    assert not torch.allclose(with_bias[1][:, 0], without[1][:, 0], atol=1e-2)
    monkeypatch.setattr(Placed, "bias", Near())
    masks.clear()
    answers(model, prompt)
    layers = [mask for mask in masks if mask is not None]
    assert len(layers) == 6 * 5 and len({id(mask) for mask in layers[:6]}) == 1
    places = torch.cat([torch.arange(4), 4 + torch.arange(0, 36, 3), 40 + torch.arange(5)])
    own = model.model.rotary.directions(places[None])[0]
    seen = torch.ones(21, 21, dtype=torch.bool).tril()
    torch.testing.assert_close(layers[0][0, 0][seen], (4 * (own @ own.T))[seen])
    assert [mask.shape[-1] for mask in layers[6::6]] == [22, 23, 24, 25]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("mistral", [False, True])
def test_cached_answers_are_those_of_whole_prompts(make_model, sample, method, backend, mistral):
    model, prompt = make_model(mistral=mistral), sample(3, "image", 5)
    with_backend(model, backend)
    model.pruner = method
    cached = answers(model, prompt)
    if not isinstance(method, PlacedCaches):  # whose first layers see more without a cache
        assert_same(cached, answers(model, prompt, use_cache=False))
    with_backend(model, "eager" if backend == "sdpa" else "sdpa")
    assert_same(answers(model, prompt), cached)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_mates_and_padding_change_nothing(model, sample, method, side):
    model.pruner = method
    prompts = [
        sample(3, "image", 9, seed=1),
        sample(12, "image", 2, "image", 1, seed=2),
        sample(5, seed=3),
    ]
    ids, mask = pad_batch([p.ids for p in prompts], side)
    images = torch.cat([p.images for p in prompts if p.images is not None])
    tokens, scores = answers(model, SimpleNamespace(ids=ids, images=images), attention_mask=mask)
    for row, prompt in enumerate(prompts):
        own = answers(model, prompt)
        assert_same((tokens[row], scores[row]), (own[0][0], own[1][0]))
    model.pruner = build_pruner("none")
    text = answers(model, prompts[2])
    assert_same((tokens[2], scores[2]), (text[0][0], text[1][0]))


@pytest.mark.parametrize("beams", [2, 3])
def test_beams_keep_it(model, sample, method, beams):
    model.pruner = method
    prompts = [sample(3, "image", 5, seed=1), sample(6, seed=2), sample(2, "image", 2, seed=2)]
    ids, mask = pad_batch([prompt.ids for prompt in prompts])
    images = torch.cat([p.images for p in prompts if p.images is not None])
    options = {**GREEDY, "num_beams": beams}
    out = model.generate(ids, images=images, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt.ids, images=prompt.images, **options)
        assert torch.equal(out[row], alone[0])
        if not isinstance(method, PlacedCaches):
            slow = model.generate(prompt.ids, images=prompt.images, use_cache=False, **options)
            assert torch.equal(slow, alone)


@pytest.mark.parametrize("others", [False, True], ids=["one image", "two images"])
def test_questions_that_share_a_beginning_look_at_it_from_their_places(
    model, sample, method, others
):
    model.pruner, cache = method, PrefixCache(model)
    pictures = [Picture(sample("image", seed=n).images[0], (SIDE, SIDE)) for n in (1, 2)]
    first = sample(4, "image", seed=1).ids[0]
    prompts = [torch.cat([first, sample(n, seed=n).ids[0, 1:]]) for n in (5, 9, 3)]
    own = [pictures[n % 2 if others else 0] for n in range(3)]
    for _ in range(2):
        out = cache.generate(
            prompts,
            [[image] for image in own],
            ["why"] * 3,
            output_scores=True,
            return_dict_in_generate=True,
            **GREEDY,
        )
    assert any(cache._beginnings.values())
    for row, (prompt, image) in enumerate(zip(prompts, own, strict=True)):
        alone = answers(model, SimpleNamespace(ids=prompt[None], images=image.pixels[None]))
        scores = torch.stack(out.scores, dim=1)[row]
        assert_same((out.sequences[row], scores), (alone[0][0], alone[1][0]))


def test_positions_on_three_axes_have_it(own_grids_model, method):
    from llava.pruning.testing.tiny import sample

    model, prompt = own_grids_model, sample(4, "image", 5)
    model.pruner = method
    one = SimpleNamespace(ids=prompt.ids, images=[picture(6, 5)])
    cached = answers(model, one)
    if not isinstance(method, PlacedCaches):
        assert_same(cached, answers(model, one, use_cache=False))
    other = sample(7, "image", 2, seed=1)
    ids, mask = pad_batch([prompt.ids, other.ids])
    both = SimpleNamespace(ids=ids, images=[picture(6, 5), picture(2, 3, 1)])
    tokens, scores = answers(model, both, attention_mask=mask)
    assert_same((tokens[0], scores[0]), (cached[0][0], cached[1][0]))


def test_recorded_attention_is_that_of_the_layer(model, sample):
    class Recording(DecoderStage, Placed):
        def before_layer(self, index, prefill):
            if index == 1:
                seen.append(prefill.next_attention())
                _, row = prefill.decoder.branch(prefill, prefill.decoder.layers[1:2])
                seen.append(row[:, :, 0].mean(dim=1))
            if index == 2:
                seen.append(prefill.attention[:, :, -1].mean(dim=1))
            return prefill

        def probe(self, num_layers):
            return replace(super().probe(num_layers), layers=(1,))

    model.pruner, prompt, seen = Recording(12), sample(3, "image", 5), []
    answers(model, prompt)
    torch.testing.assert_close(seen[1], seen[0])
    torch.testing.assert_close(seen[2], seen[0])
    model.pruner.bias = None
    answers(model, prompt)
    assert not torch.allclose(seen[0], seen[3], atol=1e-4)
    model.pruner = Placed(12)
    with trace_pruning(model, attention=[1]) as trace:
        tokens, _ = answers(model, prompt)
    longer = torch.cat([prompt.ids, tokens[:, :1]], dim=1)
    with trace_pruning(model, attention=[1]) as again:
        model.generate(longer, images=prompt.images, **{**GREEDY, "max_new_tokens": 1})
    # What the first token of an answer attends to, as a token of the answer and of a prompt.
    own = trace.answer_attention[1][0]
    wanted = again.attention[1][..., : own.shape[-1]]
    torch.testing.assert_close(own, wanted, atol=1e-5, rtol=1e-4)


class PlacedTwig(VisionStage, TwigVLM):
    position_policy = "grid"
    bias = Near()

    def after_layouts(self, images):
        return [replace(image, position_bias=self.bias) for image in images]


@pytest.mark.parametrize("bias", [Near(), Near(answers=False)], ids=["all", "prompt"])
@pytest.mark.parametrize("nodes", [0, 60])
@pytest.mark.parametrize("pruning", [True, False])
def test_tokens_are_guessed_and_verified_with_it(make_model, sample, bias, pruning, nodes):
    class Twig(PlacedTwig):
        pass

    Twig.bias = bias
    model, prompt = make_model(), sample(4, "image", 5)
    model.lm_head.weight.data *= 8
    options = dict(visual_token_num=14, enable_pruning=pruning, draft_stop_prob=0.0)
    grown(model, 2, 4, method=Twig, **options)
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
    assert pruning or fast.logs[0].acceptance_rate == 1


def test_flash_attention_leaves_it_to_sdpa_and_says_so(make_model, sample, caplog, monkeypatch):
    asked = []
    module = types.ModuleType("flash_attn")
    module.flash_attn_func = lambda *_, **__: asked.append(1)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    model, prompt = make_model(), sample(3, "image", 5)
    model.pruner = Placed(12)
    wanted = answers(model, prompt)
    with_backend(model, "flash_attention_2")
    attention.say_no_bias.cache_clear()
    assert_same(answers(model, prompt), wanted)
    assert not asked and caplog.text.count("flash_attention_2 cannot add a bias") == 1


def test_two_biases_in_one_batch_are_an_error(model, sample):
    prompts = [sample(3, "image", 5, seed=1), sample(3, "image", 5, seed=2)]
    ids, images = (torch.cat([getattr(p, name) for p in prompts]) for name in ("ids", "images"))
    model.pruner = Placed(12)
    prompt = model.build_prompt(ids, images=images, padding_side="left")
    prompt.position_bias[1] = Near(strength=1.0)
    with pytest.raises(ValueError, match="prompts of one batch ask for different biases"):
        model.generate_from(prompt, **GREEDY)
