"""A bias of attention by where tokens stand: the same in every way to run prompts and answers."""

import sys
import types
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from llava.model.language_model import attention
from llava.model.language_model.attention import attend, attention_mask
from llava.model.language_model.layers import Rotary
from llava.model.position_bias import between, joined
from llava.pruning import DecoderStage, VisionStage, build_pruner, trace_pruning
from llava.pruning.base import DecoderPruner, SelectPruner
from llava.pruning.ops import repeat_heads
from llava.pruning.position_bias import PositionBias
from llava.pruning.testing.tiny import picture
from llava.pruning.twigvlm import TwigVLM
from tests.conftest import pad_batch
from tests.model.bias_tools import (
    GREEDY,
    CutCaches,
    NotesAttention,
    answers,
    assert_beams_are_those_of_each,
    assert_guesses_change_nothing,
    assert_noted_attention_is_the_same,
    assert_rows_are_those_of_each,
    assert_same,
    assert_shared_beginnings_change_nothing,
    third_patches,
    watched_masks,
    with_backend,
)
from tests.pruning.test_twigvlm import grown


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
    select = third_patches

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


class PlacedCaches(CutCaches, Placed):
    """Takes tokens out of the caches of layers that ran."""

    name = "placed caches"


METHODS = [Placed(12), PlacedWeighing(12), PlacedPrompt(12), PlacedCut(12), PlacedCaches(12)]


@pytest.fixture(params=METHODS, ids=lambda method: method.name)
def method(request):
    return request.param


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
    whole = [repeat_heads(x, 4) for x in (k, v)]
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
    prompt = sample(3, "image", 5)
    model.pruner = Placed(12)
    with_bias = answers(model, prompt)
    masks = watched_masks(monkeypatch)
    monkeypatch.setattr(Placed, "bias", None)
    without = answers(model, prompt)
    assert all(mask is None for mask in masks)
    assert not torch.allclose(with_bias[1][:, 0], without[1][:, 0], atol=1e-2)
    monkeypatch.setattr(Placed, "bias", Near())
    masks.clear()
    answers(model, prompt)
    layers = [mask for mask in masks if mask is not None]
    assert len(layers) == 6 * 5 and len({id(mask) for mask in layers[:5]}) == 1
    assert torch.equal(layers[5], layers[0][:, :, -1:])
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
    tokens, scores = assert_rows_are_those_of_each(model, prompts, side)
    model.pruner = build_pruner("none")
    text = answers(model, prompts[2])
    assert_same((tokens[2], scores[2]), (text[0][0], text[1][0]))


@pytest.mark.parametrize("beams", [2, 3])
def test_beams_keep_it(model, sample, method, beams):
    model.pruner = method
    prompts = [sample(3, "image", 5, seed=1), sample(6, seed=2), sample(2, "image", 2, seed=2)]
    cacheless = not isinstance(method, PlacedCaches)
    assert_beams_are_those_of_each(model, prompts, beams, cacheless)


@pytest.mark.parametrize("others", [False, True], ids=["one image", "two images"])
def test_questions_that_share_a_beginning_look_at_it_from_their_places(
    model, sample, method, others
):
    model.pruner = method
    cache = assert_shared_beginnings_change_nothing(model, sample, two_images=others)
    assert any(cache._beginnings.values())


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
    class Recording(NotesAttention, DecoderStage, Placed):
        def probe(self, num_layers):
            return replace(super().probe(num_layers), layers=(1,))

    model.pruner, prompt = Recording(12), sample(3, "image", 5)
    assert_noted_attention_is_the_same(
        model, prompt, without=lambda method: setattr(method, "bias", None)
    )
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
    model = make_model()
    model.lm_head.weight.data *= 8
    options = dict(visual_token_num=14, enable_pruning=pruning, draft_stop_prob=0.0)
    grown(model, 2, 4, method=Twig, **options)
    assert_guesses_change_nothing(model, sample(4, "image", 5), nodes, all_right=not pruning)


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
