"""What a method changes between decoder layers holds from there on, with and without a drop."""

from dataclasses import replace

import pytest
import torch

from llava.model.reuse import Picture, PrefixCache
from llava.pruning import DecoderStage, trace_pruning
from llava.pruning.base import Pruner
from tests.conftest import SIDE, pad_batch

GREEDY = dict(do_sample=False, max_new_tokens=5, eos_token_id=-1, pad_token_id=0)


class Hook(DecoderStage, Pruner):
    """Does `change` to the prompts before one layer."""

    name = "hook"

    def __init__(self, change, layer=1):
        self.change, self.layer = change, layer

    def before_layer(self, index, prefill):
        return self.change(prefill) if index == self.layer else prefill


def replaced(**values):
    """Assigns new tensors to a copy of the prompts."""
    return lambda prefill: replace(prefill, **{k: v(prefill) for k, v in values.items()})


def assigned(**values):
    """Assigns new tensors to the prompts themselves."""

    def change(prefill):
        for name, value in values.items():
            setattr(prefill, name, value(prefill))
        return prefill

    return change


def zero(prefill):
    return torch.zeros_like(prefill.position_ids)


def without_some(prefill):
    """Hides every other patch."""
    valid = torch.ones_like(prefill.index, dtype=torch.bool)
    if prefill.valid is not None:
        valid = prefill.valid
    return valid & (prefill.patch_index % 2 != 0)


def logits(model, prompt, hook=None, mode=torch.no_grad, **options):
    model.pruner = Pruner() if hook is None else hook
    with mode():
        return model(prompt.ids, images=prompt.images, **options).logits


@pytest.fixture
def prompt(sample):
    return sample(4, "image", 5)


def by_hand(model, prompt, layer, positions, visible):
    """Logits of the last token when layers from `layer` on see other positions or fewer tokens."""
    spliced = model.build_prompt(prompt.ids, images=prompt.images)
    x, size = spliced.inputs_embeds, spliced.inputs_embeds.shape[1]
    causal = torch.ones(size, size, dtype=bool).tril()[None, None]
    for number, own in enumerate(model.model.layers):
        places = positions if number >= layer else torch.arange(size)[None]
        seen = causal & (visible if number >= layer else torch.ones_like(visible))[:, None, None]
        seen = seen | ~seen.any(dim=-1, keepdim=True)
        normed, attention = own.input_layernorm(x), own.self_attn
        rope = model.model.rotary(places, x.dtype)
        q, k = attention.queries(normed, rope), attention.keys(normed, rope)
        scores = (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
        out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ attention.values(normed)
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        x = x + own.mlp(own.post_attention_layernorm(x))
    return model.logits_of(model.model.norm(x))[:, -1]


@pytest.mark.parametrize("how", [replaced, assigned])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layer", [0, 1, 4])
def test_positions_hold(model, prompt, how, mode, layer):
    plain = logits(model, prompt)
    changed = logits(model, prompt, Hook(how(position_ids=zero), layer), mode)
    size = changed.shape[1]
    every = torch.ones(1, size, dtype=bool)
    wanted = by_hand(model, prompt, layer, torch.zeros(1, size), every)
    torch.testing.assert_close(changed[:, -1], wanted, atol=1e-4, rtol=1e-4)
    assert (changed - plain).abs().max() > 1e-3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", [replaced, assigned])
@pytest.mark.parametrize("layer", [0, 3])
def test_validity_holds(model, prompt, mode, how, layer):
    changed = logits(model, prompt, Hook(how(valid=without_some), layer), mode)
    size = changed.shape[1]
    visible = torch.ones(1, size, dtype=bool)
    visible[0, 5:41:2] = False
    wanted = by_hand(model, prompt, layer, torch.arange(size)[None], visible)
    torch.testing.assert_close(changed[:, -1], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", [replaced, assigned])
def test_validity_of_a_padded_batch_holds_while_decoding(model, sample, how):
    """As if the hidden tokens had been dropped there."""
    prompts = [sample(3, "image", 9, seed=1), sample(6, "image", 2, seed=2)]
    ids, mask = pad_batch([p.ids for p in prompts])
    images = torch.cat([p.images for p in prompts])
    found = []
    for change in (how(valid=without_some), lambda p: p.keep(without_some(p))):
        model.pruner = Hook(change, 2)
        with trace_pruning(model) as trace:
            found.append((model.generate(ids, images=images, attention_mask=mask, **GREEDY), trace))
    assert torch.equal(found[0][0], found[1][0])
    for hidden, dropped in zip(found[0][1].kv_lengths, found[1][1].kv_lengths, strict=True):
        assert torch.equal(hidden, dropped)
    for row, wanted in zip(*(trace.decoder_keep[2] for _, trace in found), strict=True):
        assert torch.equal(row, wanted)


def test_the_place_of_the_answer_holds(model, prompt):
    """In the layers from there on, and in all of them when it is set behind the last."""
    model.pruner = Pruner()
    spliced = model.build_prompt(prompt.ids, images=prompt.images)

    class Late(Hook):
        def before_layer(self, index, prefill):
            return prefill

        def after_layers(self, prefill):
            return self.change(prefill)

    far = replaced(next_position=lambda p: torch.full((1,), 100))
    for hook, wanted in ((Hook(far, 3), [46] * 3 + [100] * 3), (Late(far), [100] * 6)):
        model.pruner = hook
        cache = model(
            inputs_embeds=spliced.inputs_embeds,
            visuals=spliced.visuals,
        ).past_key_values
        assert [int(row.next_position) for row in cache.rows] == wanted


@pytest.mark.parametrize("field", ["visual_index", "patch_index", "extras"])
@pytest.mark.parametrize("how", [replaced, assigned])
def test_marks_reach_the_next_layers(model, prompt, field, how):
    seen = []

    class Reader(Hook):
        def before_layer(self, index, prefill):
            seen.append(getattr(prefill, field))
            return super().before_layer(index, prefill)

    marks = {"extras": lambda p: {"mine": torch.full((*p.index.shape, 3), 7.0)}}
    mark = marks.get(field, lambda p: torch.full_like(p.index, 7))
    logits(model, prompt, Reader(how(**{field: mark})))
    assert seen[0] is not seen[2] and all(value is seen[2] for value in seen[2:])
    found = seen[2]["mine"] if field == "extras" else seen[2]
    assert (found == 7).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "field",
    ["position_ids", "valid", "index", "visual_index", "patch_index", "extras", "next_position"],
)
def test_writing_into_what_others_use_is_refused(model, prompt, mode, field):
    """Earlier layers, their caches and the trace hold the same tensors."""

    def before(prefill):
        new = dict(
            valid=torch.ones_like(prefill.index, dtype=torch.bool),
            extras={"mine": torch.zeros_like(prefill.index)},
            next_position=torch.tensor([46]),
        )
        return replace(prefill, **{k: v for k, v in new.items() if k == field})

    class Writer(Hook):
        def before_layer(self, index, prefill):
            if index == 2:
                value = getattr(prefill, field)
                (value["mine"] if field == "extras" else value)[..., -1:] = 0
            return super().before_layer(index, prefill)

    with pytest.raises(ValueError, match="hook writes into .* before layer 2, .*: assign a new"):
        logits(model, prompt, Writer(before, 1), mode)


def test_the_trace_shows_positions_that_were_changed_before_the_first_layer(model, prompt):
    model.pruner = Hook(replaced(position_ids=zero), 0)
    with trace_pruning(model) as trace, torch.no_grad():
        model(prompt.ids, images=prompt.images)
    assert not trace.position_ids.any()


WRONG = {
    "one position for all": (dict(position_ids=lambda p: p.position_ids[:, :1]), "position_ids of"),
    "validity as numbers": (dict(valid=lambda p: torch.ones_like(p.index)), "must be torch.bool"),
    "fewer tokens, all marks": (dict(hidden_states=lambda p: p.hidden_states[:, 1:]), "of shape"),
    "fewer extras": (
        dict(extras=lambda p: {"mine": p.index[:, 1:]}, position_ids=zero),
        r"extras\['mine'\] of shape \(1, 45\) .* those of \(1, 46\) tokens",
    ),
    "two places": (dict(next_position=lambda p: torch.ones(2)), "next_position of shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_values_that_do_not_fit_one_another_are_refused(model, prompt, name):
    values, message = WRONG[name]
    with pytest.raises(ValueError, match=f"hook left .*{message}"):
        logits(model, prompt, Hook(replaced(**values)))


def test_a_hook_that_returns_nothing_is_named(model, prompt):
    with pytest.raises(ValueError, match="hook gave NoneType back before layer .*the Prefill"):
        logits(model, prompt, Hook(lambda prefill: None))


@pytest.mark.parametrize("field", ["position_ids", "valid"])
def test_behind_the_last_layer_it_is_too_late(model, prompt, field):
    class Late(DecoderStage, Pruner):
        name = "late"

        def after_layers(self, prefill):
            return replaced(**{field: zero if field == "position_ids" else without_some})(prefill)

    with pytest.raises(ValueError, match=f"late changes {field} in after_layers, when all layers"):
        logits(model, prompt, Late())


def double(prefill):
    return prefill.hidden_states * 2


@pytest.mark.parametrize("field", ["position_ids", "valid", "hidden_states"])
def test_layers_called_untouched_are_held_to_it(model, sample, field):
    value = {"position_ids": zero, "valid": without_some, "hidden_states": double}[field]

    class Wrong(Hook):
        def reusable_layers(self, prefill):
            return 3

    model.pruner = Wrong(replaced(**{field: value}), 0)
    first = sample(4, "image", seed=1).ids[0]
    prompts = [torch.cat([first, sample(n, seed=n).ids[0, 1:]]) for n in (9, 5)]
    picture = Picture(torch.randn(3, SIDE, SIDE), (SIDE, SIDE))
    with pytest.raises(ValueError, match="hook changes tokens before layer 0, but its reusable"):
        PrefixCache(model).generate(prompts, [[picture]] * 2, ["a"] * 2, **GREEDY)
