"""Where a method acts: stages, and what is said when a class is derived in the wrong way."""

import pytest
import torch

from llava.pruning import (
    METHODS,
    DecoderStage,
    Probe,
    Pruner,
    SelectPruner,
    VisionStage,
    build_pruner,
    can_draft,
)
from llava.pruning.stages import HOOKS, filled_hooks, fills
from llava.pruning.testing.tiny import picture


def test_a_method_is_its_own_stage_where_it_acts():
    for name, method in METHODS.own.items():
        pruner = build_pruner(name)
        for stage, base in ((pruner.vision, VisionStage), (pruner.decoder, DecoderStage)):
            assert (stage is pruner) == issubclass(method, base)
            assert stage is pruner or type(stage) is base  # which does nothing


def test_every_stage_of_a_method_does_something():
    for name, method in METHODS.own.items():
        for base, hooks in HOOKS.items():
            if issubclass(method, base):
                assert fills(method, base, *hooks), f"{name} is a {base.__name__} without a hook"


def test_the_stages_of_a_chain_are_those_of_its_methods():
    chain = build_pruner("visionzip+adaptprune")
    assert chain.vision is chain.first and chain.decoder is chain.second
    hooks = [(stage.name, hook) for stage, hook in filled_hooks(chain.vision, chain.decoder)]
    assert hooks == [
        ("visionzip", "after_encoder"),
        ("visionzip", "after_projector"),
        ("adaptprune", "before_prompt"),
        ("adaptprune", "before_layer"),
    ]


def test_a_stage_that_does_nothing_leaves_everything_alone():
    vision, decoder, given = Pruner().vision, Pruner().decoder, object()
    assert vision.after_encoder(given) is given and vision.after_layout(given) is given
    assert decoder.before_layer(0, given) is given and decoder.probe(4).layers == ()
    assert not can_draft(Pruner) and can_draft(METHODS["twigvlm"])


@pytest.mark.parametrize(
    "base, hook, stage",
    [
        (Pruner, "before_layer", "DecoderStage"),
        (SelectPruner, "probe", "DecoderStage"),
        (Pruner, "needs", "VisionStage"),
    ],
)
def test_a_hook_that_nobody_would_call_is_an_error(base, hook, stage):
    with pytest.raises(TypeError, match=rf"Mine defines {hook}, .* class Mine\({stage}, ...\)"):
        type("Mine", (base,), {hook: None})


def test_a_stage_alone_is_no_method(model):
    with pytest.raises(ValueError, match="pruner must come from build_pruner"):
        model.pruner = DecoderStage()


def test_rows_of_a_layer_that_is_not_there_are_refused_at_load_time(model):
    class Mine(DecoderStage, Pruner):
        def probe(self, num_layers):
            return Probe((1, num_layers))

    with pytest.raises(ValueError, match="attention rows of layer 6 are asked for, of 6"):
        model.pruner = Mine()
    with pytest.raises(ValueError, match="unknown form 'logits' of a probe, choose from"):
        Probe((1,), form="logits")


def test_rows_are_those_that_a_probe_names(model, sample):
    seen = []

    class Mine(DecoderStage, Pruner):
        def probe(self, num_layers):
            return Probe((1, 3), lambda prefill: prefill.last[:, None] - torch.tensor([2, 1, 0]))

        def before_layer(self, index, prefill):
            seen.append(None if prefill.attention is None else prefill.attention.shape[2])
            return prefill

    prompt = sample(4, "image", 5)
    model.pruner = Mine()
    model.generate(prompt.ids, images=prompt.images, max_new_tokens=1, do_sample=False)
    assert seen == [None, None, 3, None, 3, None]


@pytest.mark.parametrize("kind", ["model", "own_grids_model"])
def test_keys_are_those_that_a_layer_made(request, sample, kind):
    model, seen = request.getfixturevalue(kind), []
    attention = model.model.layers[1].self_attn
    make = attention.keys

    class Mine(DecoderStage, Pruner):
        def probe(self, num_layers):
            return Probe((1,), form="keys")

        def before_layer(self, index, prefill):
            seen.append(prefill.keys)
            assert prefill.attention is None
            return prefill.keep(prefill.index != 3) if index == 2 else prefill

    made = []
    attention.keys = lambda *args: made.append(make(*args)) or made[-1]
    prompt = sample(4, "image", 5)
    images = [picture(4, 9)] if kind == "own_grids_model" else prompt.images
    model.pruner = Mine()
    try:
        with torch.no_grad():
            model(prompt.ids, images=images)
            model.generate(prompt.ids, images=images, max_new_tokens=1, do_sample=False)
    finally:
        del attention.keys
    assert [keys is not None for keys in seen] == 2 * [False, False, True, False, False, False]
    assert torch.equal(seen[2], made[0]) and torch.equal(seen[8], made[1])
    assert seen[2].shape == (1, attention.num_kv_heads, 46, 8)
    with pytest.raises(ValueError, match="keys of layer 1 are asked for, of 1"):
        Mine().probe(1).check(1)
