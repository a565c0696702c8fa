"""The decoder: equal to the stock implementation, and what it adds to it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from llava.model.kv_cache import KVCache
from llava.model.language_model.attention import attend, attention_rows, padded_causal_mask
from llava.model.language_model.modeling_llama import Rotary
from llava.pruning import DecoderStage
from llava.pruning.base import DecoderPruner, Pruner
from tests.conftest import TINY, make_pruner, pad_batch


def stock_twin(model, mistral=False):
    """transformers' own decoder with the same weights."""
    names = LlamaConfig().to_dict().keys() & model.config.to_dict().keys()
    values = {k: v for k, v in model.config.to_dict().items() if k in names}
    if mistral:
        twin = MistralForCausalLM(MistralConfig(**values, sliding_window=None))
    else:
        twin = LlamaForCausalLM(LlamaConfig(**values))
    missing, _ = twin.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    return twin.eval()


@pytest.mark.parametrize("mistral", [False, True])
def test_logits_equal_the_stock_decoder(make_model, mistral):
    model = make_model(mistral=mistral)
    twin = stock_twin(model, mistral)
    ids = torch.randint(3, 90, (2, 17), generator=torch.Generator().manual_seed(0))
    ours = model(input_ids=ids).logits
    torch.testing.assert_close(ours, twin(ids).logits, atol=2e-5, rtol=1e-4)


def test_greedy_and_beam_tokens_equal_the_stock_decoder(make_model):
    model = make_model()
    twin = stock_twin(model)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    for beams in (1, 3):
        options = dict(max_new_tokens=8, do_sample=False, num_beams=beams, eos_token_id=-1)
        theirs = twin.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, 9:]
        assert torch.equal(model.generate(ids, **options), theirs)


def test_eager_and_sdpa_agree(make_model):
    model = make_model()
    ids = torch.randint(3, 90, (1, 11), generator=torch.Generator().manual_seed(2))
    expected = model(input_ids=ids).logits
    for layer in model.model.layers:
        layer.self_attn.backend = "eager"
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=2e-5, rtol=1e-4)


def test_linear_rope_scaling_stretches_positions():
    config = LlamaConfig(**{k: TINY[k] for k in ("hidden_size", "num_attention_heads")})
    plain = Rotary(config)(torch.tensor([[3]]), torch.float32)
    config.rope_scaling = {"type": "linear", "factor": 2.0}
    stretched = Rotary(config)(torch.tensor([[6]]), torch.float32)
    torch.testing.assert_close(stretched, plain)
    config.rope_scaling = {"type": "dynamic", "factor": 2.0}
    with pytest.raises(ValueError, match="linear"):
        Rotary(config)


def test_every_axis_of_a_position_turns_its_own_frequencies():
    config = LlamaConfig(**{k: TINY[k] for k in ("hidden_size", "num_attention_heads")})
    plain = Rotary(config)
    config.rope_scaling = {"type": "mrope", "mrope_section": [1, 2, 1]}
    rotary = Rotary(config)
    three = torch.tensor([[[7, 2, 5], [1, 0, 9]]])
    turned = rotary(three, torch.float32)
    for axis, frequencies in enumerate(([0, 4], [1, 2, 5, 6], [3, 7])):
        own = plain(three[..., axis], torch.float32)
        for ours, theirs in zip(turned, own, strict=True):
            assert torch.equal(ours[..., frequencies], theirs[..., frequencies])
    alike = torch.tensor([[3, 8]])  # text: the same place on every axis
    assert all(map(torch.equal, rotary(alike, torch.float32), plain(alike, torch.float32)))


def test_an_answer_follows_the_furthest_position_on_any_axis(model):
    prefill = model.model.start(
        torch.zeros(2, 3, TINY["hidden_size"]),
        attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]),
        position_ids=torch.tensor(
            [[[99, 99, 99], [0, 0, 0], [0, 1, 4]], [[0, 0, 0], [0, 6, 0], [2, 2, 2]]]
        ),
    )
    assert prefill.follows.tolist() == [5, 7]


def test_recorded_rows_are_rows_of_the_attention_map():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8)
    valid = torch.tensor([[True] * 7, [False, False] + [True] * 5])
    rows = torch.tensor([[6, 2], [5, 3]])
    got = attention_rows(q, k, rows, valid)
    full = q @ k.repeat_interleave(2, dim=1).transpose(2, 3) * 8**-0.5
    allowed = torch.ones(7, 7).tril().bool() & valid[:, None, None]
    full = full.masked_fill(~allowed, float("-inf")).softmax(-1)
    for b in range(2):
        torch.testing.assert_close(got[b], full[b][:, rows[b]])


def test_padding_never_turns_into_nan():
    valid = torch.tensor([[False, False, True, True]])
    q = k = v = torch.randn(1, 1, 4, 8)
    out = attend(q, k, v, padded_causal_mask(valid, 4), "sdpa")
    assert out.isfinite().all()


def test_the_cache_holds_the_prompt_uncopied_then_appends_in_place_and_grows_only_when_full():
    cache = KVCache(1, reserve=2)
    one, prompt = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 3, 4)
    cache.append(0, prompt, prompt)
    assert cache.entries(0)[0].data_ptr() == prompt.data_ptr()
    cache.append(0, one, one)
    buffer = cache._keys[0].data_ptr()
    assert cache._keys[0].shape[2] == 5
    keys, _ = cache.append(0, one, one)
    assert cache._keys[0].data_ptr() == buffer and keys.shape[2] == 5
    keys, _ = cache.append(0, one, one)
    assert cache._keys[0].data_ptr() != buffer
    assert keys[0, 0, :, 0].tolist() == [0, 0, 0, 1, 1, 1]


def test_an_append_after_a_crop_leaves_the_prompt_it_was_given_alone():
    cache = KVCache(1, reserve=2)
    prompt = torch.zeros(1, 1, 3, 4)
    cache.append(0, prompt, prompt)
    cache.crop(0, 2)
    keys, _ = cache.append(0, torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
    assert keys[0, 0, :, 0].tolist() == [0, 0, 1] and prompt.eq(0).all()


class DropHalf(DecoderPruner):
    """Keeps the first tokens of every image before layer 2; forgets them in earlier layers too."""

    def pruned_caches(self, index, num_layers):
        return range(index)

    def score(self, prefill):
        return -prefill.index.float()


def test_tokens_can_leave_the_caches_of_layers_that_already_ran(model, sample):
    from llava.pruning import trace_pruning

    prompt = sample(3, "image", 4)
    model.pruner = DropHalf(visual_token_num=5, layer=2)
    with trace_pruning(model) as trace:
        model.generate(prompt.ids, images=prompt.images, max_new_tokens=3, do_sample=False)
    assert [int(n[0]) for n in trace.kv_lengths] == [8 + 5] * 6
    assert [int(n[0]) for n in trace.visual_tokens] == [36, 36, 5, 5, 5, 5]
    assert trace.decoder_keep[2][0].tolist() == list(range(4)) + [4, 5, 6, 7, 8] + [40, 41, 42, 43]


class Renumber(DecoderPruner):
    def before_layer(self, index, prefill):
        if index != self.layer:
            return prefill
        return prefill.keep_visual(self.score(prefill), self.visual_token_num, renumber=True)


def test_renumbered_positions_continue_from_the_shorter_prompt(model, sample):
    prompt = sample(3, "image", 4)
    model.pruner = Renumber(visual_token_num=5, layer=2)
    cache = KVCache(6, reserve=4)
    spliced = model.build_prompt(prompt.ids, images=prompt.images)
    model(
        inputs_embeds=spliced.inputs_embeds,
        attention_mask=spliced.attention_mask,
        visuals=spliced.visuals,
        past_key_values=cache,
    )
    assert [int(row.next_position) for row in cache.rows] == [44, 44, 13, 13, 13, 13]


def test_rows_may_keep_different_counts(model, sample):
    class Threshold(DecoderStage, Pruner):
        def before_layer(self, index, prefill):
            if index != 1:
                return prefill
            odd = prefill.patch_index % (3 if prefill.visual_index.shape[0] == 1 else 3) == 0
            few = prefill.hidden_states[:, :, 0] > 0
            return prefill.keep(~prefill.is_visual | (odd & few))

    model.pruner = Threshold()
    prompts = [sample(3, "image", 4, seed=1), sample(3, "image", 4, seed=2)]
    alone = [
        model.generate(p.ids, images=p.images, max_new_tokens=5, do_sample=False, eos_token_id=-1)
        for p in prompts
    ]
    both = model.generate(
        torch.cat([p.ids for p in prompts]),
        images=torch.cat([p.images for p in prompts]),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=-1,
    )
    assert torch.equal(both, torch.cat(alone))


def test_labels_follow_their_tokens_when_some_are_dropped(model, sample):
    prompt = sample(3, "image", 6)
    model.pruner = Renumber(visual_token_num=5, layer=2)
    labels = prompt.ids.masked_fill(prompt.ids < 0, -100)
    evaluated = model(input_ids=prompt.ids, images=prompt.images, labels=labels)
    assert evaluated.logits.shape[1] == 10 + 5
    model.train()
    trained = model(input_ids=prompt.ids, images=prompt.images, labels=labels)
    model.eval()
    torch.testing.assert_close(trained.loss, evaluated.loss)


def test_gradient_checkpointing_gives_the_same_gradients(make_model, sample):
    prompt = sample(3, "image", 6)
    labels = prompt.ids.masked_fill(prompt.ids < 0, -100)
    grads = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=prompt.ids, images=prompt.images, labels=labels).loss.backward()
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*grads)


@torch.no_grad()
def test_the_loss_of_a_pruned_batch_is_that_of_its_prompts(model, sample):
    """Rows of different length are padded on the left, where nothing predicts their first token."""
    model.pruner = make_pruner("fastv")
    prompts = [sample(3, "image", 9, seed=1), sample(12, "image", 2, seed=2)]
    total = count = 0
    for prompt in prompts:
        labels = prompt.ids.masked_fill(prompt.ids < 0, -100)
        supervised = int((labels[:, 1:] != -100).sum())
        total += float(model(prompt.ids, labels=labels, images=prompt.images).loss) * supervised
        count += supervised
    ids, mask = pad_batch([prompt.ids for prompt in prompts], "right")
    labels = ids.masked_fill((ids < 0) | (mask == 0), -100)
    images = torch.cat([prompt.images for prompt in prompts])
    loss = model(ids, attention_mask=mask, labels=labels, images=images).loss
    assert float(loss) == pytest.approx(total / count, rel=1e-5)


def test_the_decoder_alone_takes_embeddings_and_is_read_as_that_of_transformers(model):
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    embeds = model.get_input_embeddings()(ids)
    last = model.get_model()(inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(model.lm_head(last).float(), model(ids).logits)
    with pytest.raises(ValueError, match="takes embeddings .* not ids"):
        model.get_model()(ids)


@pytest.mark.parametrize("shape", [(2, 4), (2, 6), (1, 5)])
def test_a_mask_of_another_shape_than_the_prompts_is_refused(model, shape):
    """Also one without padding, which nobody would have looked at."""
    ids = torch.full((2, 5), 7)
    with pytest.raises(ValueError, match=r"attention_mask \(.*\) must be .* \(2, 5\)"):
        model(ids, attention_mask=torch.ones(shape))
