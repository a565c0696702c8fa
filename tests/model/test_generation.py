"""What `generate` and `forward` are asked for: done, or refused in one sentence."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from llava.model.kv_cache import KVCache
from llava.pruning import build_pruner, trace_pruning
from tests.conftest import make_pruner, pad_batch
from tests.pruning.test_twigvlm import grown

GREEDY = dict(do_sample=False, max_new_tokens=4, eos_token_id=-1, pad_token_id=0)
SPECULATE = dict(generation_strategy="self_speculative")


@pytest.fixture
def prompt(sample):
    return sample(4, "image", 5)


@pytest.fixture
def two(sample):
    prompts = [sample(3, "image", 9, seed=1), sample(6, "image", 2, seed=2)]
    ids, mask = pad_batch([p.ids for p in prompts])
    return dict(inputs=ids, attention_mask=mask, images=torch.cat([p.images for p in prompts]))


REFUSED = {
    "contrastive search": (dict(penalty_alpha=0.6, top_k=4), "contrastive search .* choose greedy"),
    "contrastive search, by its config": (
        dict(generation_config=GenerationConfig(penalty_alpha=0.6, top_k=4)),
        "contrastive search",
    ),
    "prompt lookup": (dict(prompt_lookup_num_tokens=3), "assisted decoding .*self_speculative"),
    "the input of an encoder": (
        dict(encoder_repetition_penalty=1.2),
        "this is a decoder alone; use repetition_penalty",
    ),
    "a cache of the caller": (dict(past_key_values=KVCache(6)), "`past_key_values` is not suppor"),
    "a cache of transformers": (dict(past_key_values=DynamicCache()), "`past_key_values`"),
    "a cache of tuples": (dict(past_key_values=((torch.ones(1),) * 2,) * 6), "`past_key_values`"),
    "positions": (dict(position_ids=torch.arange(9)[None]), "`position_ids` .* attention_mask"),
    "attention maps": (dict(output_attentions=True), r"trace_pruning\(model, attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_sentence(model, prompt, name):
    options, message = REFUSED[name]
    model.pruner = make_pruner("fastv")
    with pytest.raises(ValueError, match=message):
        model.generate(prompt.ids, images=prompt.images, **{**GREEDY, **options})


WITHOUT_CACHE = GenerationConfig(**GREEDY, use_cache=False)


def test_a_cache_is_left_out_where_the_config_says_so(model, prompt):
    model.pruner = make_pruner("fastv")
    given = dict(inputs=prompt.ids, images=prompt.images)
    by_keyword = model.generate(**given, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(**given, generation_config=WITHOUT_CACHE), by_keyword)


def test_guesses_need_a_cache_whoever_says_that_there_is_none(model, prompt):
    model.pruner = grown(model)
    given = dict(inputs=prompt.ids, images=prompt.images, **SPECULATE)
    for options in (dict(generation_config=WITHOUT_CACHE), {**GREEDY, "use_cache": False}):
        with pytest.raises(ValueError, match="needs a cache"):
            model.generate(**given, **options)


def test_no_images_are_no_images_in_training_too(make_model, sample):
    ids, model = sample(6).ids, make_model().train()
    with torch.no_grad():
        plain = model(ids, images=None).logits
        assert torch.equal(model(ids, images=[]).logits, plain)


def test_another_model_cannot_assist(model, make_model, prompt):
    with pytest.raises(ValueError, match="`assistant_model` .*self_speculative"):
        model.generate(prompt.ids, images=prompt.images, assistant_model=make_model(), **GREEDY)


def test_embeddings_of_the_caller_are_refused(model, prompt):
    with pytest.raises(NotImplementedError, match="pass input_ids and images"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 32))


@pytest.mark.parametrize("cache", [DynamicCache(), ((torch.ones(1),) * 2,) * 6])
def test_forward_takes_no_foreign_cache(model, prompt, cache):
    with pytest.raises(ValueError, match="past_key_values must be a llava.model.kv_cache.KVCache"):
        model(prompt.ids, images=prompt.images, past_key_values=cache)


def test_what_follows_a_filled_cache_is_text_without_padding(model, prompt):
    cache = model(prompt.ids, images=prompt.images).past_key_values
    with pytest.raises(ValueError, match="<image> marks behind a filled past_key_values"):
        model(prompt.ids, images=prompt.images, past_key_values=cache)
    ids, mask = torch.tensor([[0, 5]]), torch.tensor([[1] * len(cache) + [0, 1]])
    with pytest.raises(ValueError, match="cannot be padded"):
        model(ids, attention_mask=mask, past_key_values=cache)
    whole = torch.cat([prompt.ids, torch.tensor([[5, 6]])], dim=1)
    out = model(torch.tensor([[5, 6]]), past_key_values=cache)
    wanted = model(whole, images=prompt.images).logits[:, -2:]
    torch.testing.assert_close(out.logits, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_outputs_that_the_config_asks_for_are_as_if_the_call_did(make_model, prompt, name):
    model = make_model(**{name: True})
    if name == "output_attentions":
        with pytest.raises(ValueError, match="trace_pruning"):
            model(prompt.ids, images=prompt.images)
    else:
        assert len(model(prompt.ids, images=prompt.images).hidden_states) == 7


SPECULATION = {
    "hidden states": (dict(output_hidden_states=True), "output_hidden_states is not supported"),
    "attention maps": (dict(output_attentions=True), "output_attentions is not supported"),
    "guidance": (dict(guidance_scale=1.5), "guidance_scale is not supported"),
    "beams": (dict(num_beams=2), "greedy search and sampling"),
}


@pytest.mark.parametrize("name", SPECULATION)
def test_speculation_refuses_what_holds_one_token_at_a_time(make_model, prompt, name):
    model, (options, message) = make_model(), SPECULATION[name]
    grown(model)
    with pytest.raises(ValueError, match=message):
        model.generate(prompt.ids, images=prompt.images, **GREEDY, **SPECULATE, **options)


def test_allowed_tokens_know_their_prompt(make_model, two):
    model = make_model()
    grown(model)

    def allowed(batch_id, ids):
        return [7 + batch_id]

    out = model.generate(**two, **GREEDY, prefix_allowed_tokens_fn=allowed)
    assert out.tolist() == [[7] * 4, [8] * 4]
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn takes one prompt at a time"):
        model.generate(**two, **GREEDY, **SPECULATE, prefix_allowed_tokens_fn=allowed)


def test_rows_and_a_replaced_forward_are_refused_with_speculation(make_model, prompt):
    model = make_model()
    grown(model)
    with trace_pruning(model, attention=[1]), pytest.raises(ValueError, match="attention rows"):
        model.generate(prompt.ids, images=prompt.images, **GREEDY, **SPECULATE)
    model.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="forward of this model was replaced"):
        model.generate(prompt.ids, images=prompt.images, **GREEDY, **SPECULATE)


WORKS = {
    "group beams": dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    "constrained beams": dict(num_beams=3, force_words_ids=[[5]]),
    "beam sampling": dict(num_beams=2, do_sample=True),
    "several answers": dict(do_sample=True, num_return_sequences=3),
    "no cache": dict(use_cache=False),
    "beams without a cache": dict(use_cache=False, num_beams=2),
    "penalties": dict(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=2),
    "scores and hidden states": dict(
        output_scores=True, output_hidden_states=True, return_dict_in_generate=True
    ),
}


@pytest.mark.parametrize("method", ["none", "fastv"])
@pytest.mark.parametrize("name", WORKS)
def test_other_ways_of_transformers_work(model, two, name, method):
    model.pruner, options = make_pruner(method), {**GREEDY, **WORKS[name]}
    torch.manual_seed(0)
    out = model.generate(**two, **options)
    rows = 2 * options.get("num_return_sequences", 1)
    assert (out if isinstance(out, torch.Tensor) else out.sequences).shape == (rows, 4)
    if name == "constrained beams":
        assert (out == 5).any(dim=1).all()
    if name == "scores and hidden states":
        assert len(out.scores) == 4 and len(out.hidden_states[1]) == 7
        probabilities = model.compute_transition_scores(out.sequences, out.scores, None, True)
        assert probabilities.shape == (2, 4) and (probabilities <= 0).all()


@pytest.mark.parametrize("method", ["none", "vispruner"])
def test_group_beams_of_one_group_size_are_beams(model, two, method):
    """Reordering for some beams only must not mix up the others."""
    model.pruner = make_pruner(method)
    groups = model.generate(**two, **GREEDY, num_beams=4, num_beam_groups=4, diversity_penalty=1e-9)
    assert torch.equal(groups, model.generate(**two, **GREEDY))


def test_guidance_pushes_away_from_the_negative_prompt(model, prompt):
    """Scores are those of two plain runs: w * given + (1 - w) * without the prompt."""
    options = dict(**GREEDY, output_scores=True, return_dict_in_generate=True)
    plain = model.generate(prompt.ids, images=prompt.images, **options).scores[0].log_softmax(-1)
    start = model.generation_config.bos_token_id or 1
    negative = model(torch.tensor([[start]])).logits[:, -1].log_softmax(-1)
    out = model.generate(prompt.ids, images=prompt.images, guidance_scale=1.5, **options)
    torch.testing.assert_close(
        out.scores[0], 1.5 * (plain - negative) + negative, atol=1e-4, rtol=1e-4
    )


def test_a_length_counts_the_answer_and_its_start_mark(model, prompt):
    """As in LLaVA, whose prompts enter as embeddings."""
    out = model.generate(
        prompt.ids, images=prompt.images, do_sample=False, max_length=6, eos_token_id=-1
    )
    assert out.shape == (1, 5)
    config = GenerationConfig(max_new_tokens=3, eos_token_id=-1, pad_token_id=0)
    assert model.generate(prompt.ids, images=prompt.images, generation_config=config).shape == (
        1,
        3,
    )


# --- attention rows ---------------------------------------------------------------------------


def eager_map(model, x, layer):
    """(B, H, S, S) attention map of a layer, written out."""
    own = model.model.layers[layer]
    positions = torch.arange(x.shape[1])[None]
    rope = model.model.rotary(positions, x.dtype)
    x, attention = own.input_layernorm(x), own.self_attn
    q, k = attention.queries(x, rope), attention.keys(x, rope)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1)


def test_a_trace_records_what_the_last_prompt_token_attends_to(model, prompt):
    with trace_pruning(model, attention=[0, -1]) as trace:
        out = model(prompt.ids, images=prompt.images, output_hidden_states=True)
    assert sorted(trace.attention) == [0, 5]
    for layer in (0, 5):
        wanted = eager_map(model, out.hidden_states[layer], layer)[:, :, -1]
        torch.testing.assert_close(trace.attention[layer], wanted, atol=1e-6, rtol=1e-5)
    (image,) = trace.image_attention(5)
    assert torch.equal(image, trace.attention[5][0, :, 5:41])


@pytest.mark.parametrize("method", ["none", "fastv", "pyramiddrop", "glimpseprune", "sparsevlm"])
def test_rows_are_over_the_prompt_whatever_was_dropped_or_padded(model, two, method):
    model.pruner = make_pruner(method)
    with trace_pruning(model, attention=range(6)) as trace:
        model.generate(**two, **GREEDY)
    size = trace.position_ids.shape[1]
    for layer in range(6):
        row = trace.attention[layer]
        assert row.shape == (2, 4, size)
        assert (row > 0).sum(dim=2).amax() <= trace.prompt_tokens[layer].max()
        assert (row.sum(dim=2) < 1 + 1e-5).all()
        if method in ("none", "fastv", "pyramiddrop"):  # no token that was not in the prompt
            torch.testing.assert_close(row.sum(dim=2), torch.ones(2, 4))
        images = trace.image_attention(layer)
        assert [len(image.T) for image in images] == [36, 36]
        kept = int(trace.visual_tokens[layer][0])
        assert (images[0].amax(dim=0) > 0).sum() <= kept


def test_rows_recorded_for_a_trace_change_nothing(model, two):
    model.pruner = make_pruner("fastv")
    plain = model.generate(**two, **GREEDY, output_scores=True, return_dict_in_generate=True)
    with trace_pruning(model, attention=[0, 1, 2]):
        out = model.generate(**two, **GREEDY, output_scores=True, return_dict_in_generate=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.scores, out.scores, strict=True))


def test_a_layer_that_is_not_there_has_no_rows(model):
    with pytest.raises(ValueError, match="attention layer 6 is not one of the 6 decoder layers"):
        with trace_pruning(model, attention=[6]):
            pass


def test_switching_off_forgets_the_layers(model, prompt):
    model.pruner = build_pruner("none")
    with trace_pruning(model) as trace:
        model(prompt.ids, images=prompt.images)
    assert trace.attention == {} and trace.visual_index is None
