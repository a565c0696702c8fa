"""Where the next token alone is asked for, the last layer is the last token's."""

from dataclasses import replace

import pytest
import torch

from llava.model.kv_cache import KVCache
from llava.pruning import DecoderStage, build_pruner
from llava.pruning.base import Pruner
from llava.pruning.glimpseprune import GlimpsePrune
from tests.conftest import make_pruner, pad_batch, with_random_parts
from tests.model.speculation_tools import answers, sharpened
from tests.pruning.test_twigvlm import grown


def watch(model, *names: str) -> tuple[dict[str, list[int]], list]:
    """How many tokens enter parts of the last layer, by name, from here on; and the hooks."""
    layer, seen = model.model.layers[-1], {name: [] for name in names}
    hooks = []
    for name in names:
        part = layer.get_submodule(name)
        note = seen[name].append
        hooks.append(part.register_forward_pre_hook(lambda _, x, note=note: note(x[0].shape[-2])))
    return seen, hooks


def entering(model, prompt, *names: str, **how) -> dict[str, list[int]]:
    """The same for one prompt through `forward`."""
    seen, hooks = watch(model, *names)
    try:
        with torch.no_grad():
            model(prompt.ids, images=prompt.images, **how)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp")


def test_the_other_tokens_end_with_their_keys_and_values(model, sample):
    model.pruner, prompt = build_pruner("none"), sample(4, "image", 5)
    found = entering(model, prompt, *PARTS, last_logits_only=True)
    assert found == dict(zip(PARTS, ([1], [46], [46], [1], [1]), strict=True))
    whole = entering(model, prompt, *PARTS)
    assert whole == {name: [46] for name in PARTS}


@pytest.mark.parametrize("mistral", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["none", "fastv", "sparsevlm", "nuwa", "glimpseprune"])
@torch.no_grad()
def test_logits_and_caches_are_those_of_the_whole_layer(make_model, sample, name, backend, mistral):
    """In a batch of padded rows; grouped queries with Mistral."""
    model = make_model(mistral=mistral)
    for layer in model.model.layers:
        layer.self_attn.backend = backend
    model.pruner = make_pruner(name)
    prompts = [sample(3, "image", 9, seed=1), sample(12, "image", 2, seed=2)]
    ids, mask = pad_batch([prompt.ids for prompt in prompts])
    images = torch.cat([prompt.images for prompt in prompts])
    prompt = model.splice(ids, mask, images=images, questions=["a", "b"], padding_side="left")
    how = {"inputs_embeds": prompt.inputs_embeds, "attention_mask": prompt.attention_mask}
    how |= {"position_ids": prompt.position_ids, "visuals": prompt.visuals}
    own, others = KVCache(6), KVCache(6)
    seen, hooks = watch(model, "mlp")
    last = model(**how, past_key_values=own, last_logits_only=True).logits
    hooks[0].remove()
    whole = model(**how, past_key_values=others).logits[:, -1:]
    assert seen == {"mlp": [1]}
    torch.testing.assert_close(last, whole, atol=2e-5, rtol=1e-4)
    assert own.lengths == others.lengths
    for mine, theirs in zip(own.entries(5), others.entries(5), strict=True):
        torch.testing.assert_close(mine, theirs)


class Behind(DecoderStage, Pruner):
    """Looks at what leaves the last layer."""

    name = "behind"

    def after_layers(self, prefill):
        self.seen = prefill.hidden_states.shape[1]
        return prefill


def test_a_method_that_acts_behind_the_layers_gets_all_tokens(model, sample):
    model.pruner = Behind()
    found = entering(model, sample(4, "image", 5), "mlp", last_logits_only=True)
    assert found == {"mlp": [46]} and model.pruner.seen == 46


def test_a_hook_of_one_method_alone_is_called(model, sample):
    model.pruner, seen = make_pruner("fastv"), []
    model.pruner.after_layers = lambda prefill: seen.append(prefill.hidden_states.shape) or prefill
    found = entering(model, sample(4, "image", 5), "mlp", last_logits_only=True)
    assert found == {"mlp": [seen[0][1]]} and seen[0][1] > 10


@pytest.mark.parametrize("assigned", [False, True])
def test_who_builds_on_glimpseprune_is_called_behind_the_layers(model, sample, assigned):
    seen = []

    def note(prefill):
        seen.append(prefill.hidden_states.shape[1])
        return prefill

    class Mine(GlimpsePrune):
        def after_layers(self, prefill):
            return note(super().after_layers(prefill))

    pruner = with_random_parts(GlimpsePrune() if assigned else Mine())
    if assigned:
        pruner.after_layers = note
    model.pruner = pruner
    assert pruner.last_dense_layer(6) < 5
    assert entering(model, sample(4, "image", 5), "mlp", last_logits_only=True) == {"mlp": seen}
    assert seen[0] > 1


def test_hidden_states_and_losses_want_the_whole_layer(model, sample):
    model.pruner, prompt = build_pruner("none"), sample(4, "image", 5)
    found = entering(model, prompt, "mlp", last_logits_only=True, output_hidden_states=True)
    assert found == {"mlp": [46]}
    labels = prompt.ids.clamp(min=0)
    assert entering(model, prompt, "mlp", labels=labels) == {"mlp": [46]}
    with pytest.raises(ValueError, match="labels ask about all tokens"):
        model(prompt.ids, images=prompt.images, labels=labels, last_logits_only=True)


def test_a_last_layer_that_is_watched_or_replaced_runs_as_a_whole(model, sample, monkeypatch):
    model.pruner, prompt = build_pruner("none"), sample(4, "image", 5)
    layer = model.model.layers[-1]
    hook = layer.register_forward_hook(lambda *_: None)
    found = entering(model, prompt, "mlp", last_logits_only=True)
    hook.remove()
    assert found == {"mlp": [46]}
    monkeypatch.setattr(layer, "forward", layer.forward)
    assert entering(model, prompt, "mlp", last_logits_only=True) == {"mlp": [46]}


def test_attention_that_is_watched_or_replaced_gives_what_it_gave(make_model, sample):
    model = make_model()
    grown(model, 2, 2, visual_token_num=14)
    prompt, attention = sample(4, "image", 5), model.model.layers[-1].self_attn
    plain, _, _ = answers(model, prompt.ids, prompt.images)
    seen = []
    hook = attention.register_forward_hook(lambda _, given, out: seen.append(out[0].shape))
    found = entering(model, prompt, last_logits_only=True)
    hook.remove()
    assert found == {} and seen[0][1] > 1

    def own(x, step, cache):  # of before `Step.last`
        return type(attention).forward(attention, x, replace(step, last=0), cache)

    attention.forward = own
    again, fast, _ = answers(model, prompt.ids, prompt.images)
    assert torch.equal(again, plain) and torch.equal(fast, plain)


def test_the_last_tokens_of_several_rows_reach_weights_without_gaps(model, sample):
    model.pruner, prompt = build_pruner("none"), sample(4, "image", 5)
    ids, images = prompt.ids.repeat(2, 1), prompt.images.repeat(2, 1, 1, 1)
    seen, part = [], model.model.layers[-1].self_attn.q_proj
    hook = part.register_forward_pre_hook(lambda _, x: seen.append(x[0].is_contiguous()))
    with torch.no_grad():
        model(ids, images=images, last_logits_only=True)
    hook.remove()
    assert seen == [True]


def test_a_decoder_that_others_replaced_is_called_as_before(model, sample, monkeypatch):
    model.pruner, prompt = build_pruner("none"), sample(4, "image", 5)
    plain, given = model.model.forward, []

    def own(*args, **kwargs):
        given.append(sorted(kwargs))
        return plain(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", own)
    assert entering(model, prompt, "mlp", last_logits_only=True) == {"mlp": [46]}
    assert "asked" not in given[0]


def test_gradients_run_the_layer_as_a_whole(model, sample):
    model.pruner, prompt = build_pruner("none"), sample(4, "image", 5)
    seen, hooks = watch(model, "mlp")
    with torch.enable_grad():
        model(prompt.ids, images=prompt.images, last_logits_only=True)
    hooks[0].remove()
    assert seen == {"mlp": [46]}


@pytest.mark.parametrize("tree", [{}, {"tree_nodes": 5, "tree_width": 2}])
def test_guesses_that_run_with_the_prompt_are_asked_for_as_well(make_model, sample, tree):
    model = sharpened(make_model(), 3)
    grown(model, 2, 2, visual_token_num=14)
    prompt = sample(4, "image", 5)
    seen, hooks = watch(model, "mlp", "self_attn.k_proj")
    plain, fast, logs = answers(model, prompt.ids, prompt.images, tree)
    for hook in hooks:
        hook.remove()
    assert torch.equal(plain, fast)
    start = len(plain[0])  # behind the steps of the plain answer
    guessed = len(logs[0].drafts[0])
    assert guessed and seen["mlp"][start] == 1 + guessed < seen["self_attn.k_proj"][start]


def test_text_alone_ends_early_as_well(model, sample):
    model.pruner, prompt = build_pruner("none"), sample(7)
    seen, hooks = watch(model, "mlp")
    model.generate(prompt.ids, do_sample=False, max_new_tokens=1)
    hooks[0].remove()
    assert seen == {"mlp": [1]}
