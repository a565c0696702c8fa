"""A bias of keys in the decoder: a token that counts for k is k tokens, whoever asks."""

import math
import sys
import types

import pytest
import torch

from llava.model.kv_cache import KVCache
from llava.model.language_model import attention
from llava.model.language_model.attention import attend
from llava.model.reuse import Prefix
from llava.model.visuals import Visuals
from llava.pruning import DecoderStage, Pruner, VisionStage, build_pruner
from llava.pruning.base import DecoderPruner, SelectPruner
from llava.pruning.twigvlm import TwigVLM
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


def weights_of(vision):
    """(B, N) a bias for each token, from its patch and the pixels of its crop."""
    numbers = vision.positions + (vision.features[:, :1, 0] * 7).round().long()
    return (1 + numbers % 5).float().log()


class Weighing(SelectPruner):
    """Keeps every third patch, some of which count for several."""

    name = "weighing"
    select = third_patches

    def after_encoder(self, vision):
        vision = super().after_encoder(vision)
        vision.extras["key_bias"] = weights_of(vision)
        return vision


class WeighingLate(DecoderPruner):
    """Drops patches before `layer`; from there on the others count for two."""

    name = "weighing late"

    def before_layer(self, index, prefill):
        prefill = super().before_layer(index, prefill)
        if index == self.cut_layer(len(prefill.decoder.layers)):
            bias = prefill.is_visual * math.log(2)
            prefill.extras = {**prefill.extras, "key_bias": bias}
        return prefill


class WeighingCaches(CutCaches, Weighing):
    """As `Weighing`, and takes tokens out of the caches of layers that ran."""

    name = "weighing caches"


METHODS = [Weighing(12), WeighingLate(12, 2), WeighingCaches(12)]


@pytest.fixture(params=METHODS, ids=lambda method: method.name)
def method(request):
    return request.param


def prompt_with_copies(model, size, copies):
    """Decoder inputs whose first token, part of an image, counts for `size`, or is there as often.

    As the first token it sees itself alone, so that the copies stay alike in all layers.
    """
    torch.manual_seed(0)
    x = model.model.embed_tokens(torch.randint(3, 90, (2, 7)))
    times = torch.tensor([size if copies else 1, *[1] * 6])
    places = torch.arange(7).repeat_interleave(times)
    image = torch.where(places < 2, 0, -1).expand(2, -1)
    bias = torch.zeros(2, len(places))
    bias[:, 0] = math.log(size)
    return dict(
        inputs_embeds=x[:, places],
        position_ids=places.expand(2, -1),
        visuals=Visuals(
            visual_index=image,
            patch_index=torch.where(image == 0, places, -1),
            extras={} if copies else {"key_bias": bias},
        ),
    )


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("mistral", [False, True])
@torch.no_grad()
def test_a_token_that_counts_for_k_in_the_decoder_is_k_tokens(make_model, backend, mistral):
    model = make_model(mistral=mistral)
    with_backend(model, backend)
    outputs, rows = [], []
    for copies in (False, True):
        inputs, cache = prompt_with_copies(model, 3, copies), KVCache(6, 4)
        hidden = [model.model(**inputs, cache=cache, stage=DecoderStage()).hidden_states[:, -6:]]
        for count in (1, 2, 1):  # decoding, one token and several at a time
            step = model.model.embed_tokens(torch.full((2, count), 17))
            hidden.append(model.model(step, cache=cache).hidden_states)
        outputs.append(torch.cat(hidden, dim=1))
        prefill = model.model.start(inputs["inputs_embeds"], position_ids=inputs["position_ids"])
        prefill.extras = inputs["visuals"].extras
        rows.append(prefill.next_attention())
    # Two tokens more in a product are another order of summation: 3e-5 with AVX2.
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rows[0][:, 1:], rows[1][:, 3:])
    torch.testing.assert_close(rows[0][:, 0], rows[1][:, :3].sum(dim=1))
    inputs = prompt_with_copies(model, 3, False)
    inputs["visuals"].extras = {}
    plain = model.model(**inputs)
    assert not torch.allclose(plain.hidden_states[:, -6:], outputs[1][:, :6], atol=1e-3)


def test_backends_agree_on_a_bias(make_model, sample, method):
    model, prompt = make_model(), sample(3, "image", 5)
    model.pruner, found = method, []
    for backend in ("sdpa", "eager"):
        with_backend(model, backend)
        found.append(answers(model, prompt))
    assert_same(*found)


def test_a_bias_changes_the_answer_and_an_equal_one_does_not(model, sample):
    class Equal(Weighing):
        def after_encoder(self, vision):
            vision = super().after_encoder(vision)
            vision.extras["key_bias"] *= 0
            return vision

    class Without(Weighing):
        after_encoder = SelectPruner.after_encoder

    scores = []
    for pruner in (Weighing(12), Equal(12), Without(12)):
        model.pruner = pruner
        scores.append(answers(model, sample(3, "image", 5))[1])
    torch.testing.assert_close(scores[1], scores[2], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(scores[0], scores[2], atol=1e-3)


def test_a_bias_stays_with_its_row_in_a_batch(model, sample, method):
    model.pruner = method
    prompts = [sample(3, "image", 9, seed=1), sample(12, "image", 2, seed=2), sample(5, seed=3)]
    assert_rows_are_those_of_each(model, prompts)


def test_a_bias_holds_without_a_cache(model, sample):
    model.pruner, prompt = Weighing(12), sample(3, "image", 5)
    assert_same(answers(model, prompt), answers(model, prompt, use_cache=False))


def test_beams_keep_the_bias_of_their_prompt(model, sample):
    model.pruner = Weighing(12)
    prompts = [sample(3, "image", 5, seed=1), sample(2, "image", 2, seed=2)]
    assert_beams_are_those_of_each(model, prompts, 3)


@pytest.mark.parametrize("others", [False, True], ids=["one image", "two images"])
def test_questions_that_share_a_beginning_share_its_bias(
    model, sample, method, others, monkeypatch
):
    shared, put = [], Prefix.put
    spy = lambda self, *args: shared.append(self.shared) or put(self, *args)  # noqa: E731
    monkeypatch.setattr(Prefix, "put", spy)
    model.pruner = method
    assert_shared_beginnings_change_nothing(model, sample, two_images=others)
    # Held once where all rows begin alike and no cache loses tokens.
    assert set(shared) == {not others and method is not METHODS[2]}


def test_caches_that_lose_tokens_keep_the_bias_of_the_others(model, sample):
    model.pruner, prompt = WeighingCaches(12), sample(3, "image", 5)
    cache = model(prompt.ids, images=prompt.images, use_cache=True).past_key_values
    weights = cache.rows[5].key_bias(cache.lengths[5])
    assert cache.lengths == [15] * 6 and weights.count_nonzero() > 2
    for state in cache.rows:
        assert torch.equal(state.key_bias(15), weights)


def test_recorded_attention_is_that_of_the_layer_with_its_bias(model, sample):
    class Recording(NotesAttention, VisionStage, DecoderPruner):
        weighs = True

        def after_encoder(self, vision):
            if self.weighs:
                vision.extras["key_bias"] = weights_of(vision)
            return vision

    model.pruner = Recording(12, layer=2)
    assert_noted_attention_is_the_same(
        model, sample(3, "image", 5), without=lambda method: setattr(method, "weighs", False)
    )


class WeighingTwig(VisionStage, TwigVLM):
    late = False

    def after_encoder(self, vision):
        if not self.late:
            vision.extras["key_bias"] = weights_of(vision)
        return vision

    def before_layer(self, index, prefill):
        prefill = super().before_layer(index, prefill)
        if self.late and index == 1:  # among the layers that the drafter shares
            prefill.extras = {**prefill.extras, "key_bias": prefill.is_visual * math.log(3)}
        return prefill


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("pruning", [True, False])
@pytest.mark.parametrize("nodes", [0, 60])
def test_tokens_are_guessed_and_verified_with_the_bias(make_model, sample, late, pruning, nodes):
    model = make_model()
    model.lm_head.weight.data *= 8
    # A twig that is the rest of the decoder is always right, on the same tokens.
    options = dict(visual_token_num=14, enable_pruning=pruning, draft_stop_prob=0.0)
    grown(model, 2, 4, method=WeighingTwig, **options).late = late
    assert_guesses_change_nothing(model, sample(4, "image", 5), nodes, all_right=not pruning)


def test_flash_attention_leaves_layers_with_a_bias_to_sdpa_and_says_so(
    make_model, sample, caplog, monkeypatch
):
    asked = []
    module = types.ModuleType("flash_attn")

    def flash(q, k, v, causal=True):
        asked.append(q.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attend(q, k, v, None, "sdpa").transpose(1, 2)

    module.flash_attn_func = flash
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    model, prompt = make_model(), sample(3, "image", 5)
    model.pruner = WeighingLate(12, 2)
    wanted = answers(model, prompt)
    with_backend(model, "flash_attention_2")
    attention.say_no_bias.cache_clear()
    assert_same(answers(model, prompt), wanted)
    assert len(asked) == 5 * 2  # the layers before the cut, in the prefill and four steps
    assert caplog.text.count("flash_attention_2 cannot add a bias to keys") == 1


def test_without_a_bias_no_layer_gets_a_mask(model, sample, monkeypatch):
    asked = watched_masks(monkeypatch)
    model.pruner = build_pruner("random", visual_token_num=12)
    answers(model, sample(3, "image", 5))
    tower = 3
    assert asked == [None] * (tower + 6 * 5)
    model.pruner = WeighingLate(12, 2)
    asked.clear()
    answers(model, sample(3, "image", 5))
    assert [mask is None for mask in asked[tower:]] == [True, True, *[False] * 4] * 5
    # The mask of the prefill is made once, for all layers with the same tokens; the last layer,
    # where only the last token asks, takes its row.
    *masks, last = asked[tower + 2 : tower + 6]
    assert len({id(mask) for mask in masks}) == 1
    assert torch.equal(last, masks[0][:, :, -1:])


@pytest.mark.parametrize(
    "bias, message",
    [
        (torch.zeros(1, 46, dtype=torch.float64), "must hold one torch.float32 for each token"),
        (torch.zeros(1, 46, 2), "must hold one torch.float32 for each token"),
        (torch.zeros(1, 45), r"left extras\['key_bias'\] of shape \(1, 45\) before layer 1"),
    ],
)
def test_a_bias_of_the_decoder_that_does_not_fit_is_an_error(model, sample, bias, message):
    class Wrong(DecoderStage, Pruner):
        name = "wrong"

        def before_layer(self, index, prefill):
            if index == 1:
                prefill.extras = {"key_bias": bias}
            return prefill

    model.pruner = Wrong()
    prompt = sample(4, "image", 5)
    with pytest.raises(ValueError, match=message):
        model.generate(prompt.ids, images=prompt.images, **GREEDY)


def test_a_bias_that_comes_behind_the_last_layer_is_an_error(model, sample):
    class Late(DecoderStage, Pruner):
        name = "late"

        def after_layers(self, prefill):
            prefill.extras = {"key_bias": prefill.is_visual.float()}
            return prefill

    model.pruner, prompt = Late(), sample(4, "image", 5)
    with pytest.raises(ValueError, match="late changes key_bias in after_layers, when all layers"):
        model.generate(prompt.ids, images=prompt.images, **GREEDY)
