"""Stage 1: what is learned from which tokens, whatever stands beside them in a batch."""

import pytest
import torch

from llava.constants import IGNORE_INDEX
from llava.pruning.twigvlm_plus import TwigVLMPlus
from llava.train.twig_plus.asked import Asked
from llava.train.twig_plus.distillation import (
    Distillation,
    TwigDistillation,
    attention_layer,
    teach,
)
from tests.conftest import pad_batch

PARTS = {"ntp", "pred_kl", "attn_kl"}


def batch_of(rows, answers, side="right"):
    """A batch of prompts whose last `answers` ids are supervised."""
    ids, mask = pad_batch([row.ids for row in rows], side)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, (own, count) in enumerate(zip(rows, answers, strict=True)):
        stop = ids.shape[1] if side == "left" else own.ids.shape[1]
        labels[row, stop - count : stop] = ids[row, stop - count : stop]
    images = [own.images for own in rows if own.images is not None]
    images = torch.cat(images) if images else None
    return dict(input_ids=ids, labels=labels, attention_mask=mask.bool(), images=images)


def distillation(model, shared=1, layers=2, **weights):
    torch.manual_seed(0)
    weights = {"attention_layer": 3, **weights}
    return TwigDistillation(model, shared, layers, Distillation(**weights))


@pytest.fixture(autouse=True)
def trainable_again(model):
    yield
    model.requires_grad_(True)


def test_it_asks_in_front_of_the_first_answer_and_of_the_images_before_it(model, sample):
    rows = [sample(3, "image", 6, seed=1), sample(2, "image", 4, "image", 5, seed=2), sample(9)]
    batch = batch_of(rows, [2, 7, 3])
    batch["labels"][1, 9:] = IGNORE_INDEX  # the answer ends in front of the second image
    prompt = model.build_prompt(
        batch["input_ids"], batch["attention_mask"], batch["labels"], batch["images"]
    )
    asked = Asked.of(prompt)
    assert asked.real.sum(dim=1).tolist() == [36, 36, 0]
    for row in range(3):
        first = (prompt.labels[row] != IGNORE_INDEX).nonzero()[0, 0]
        assert asked.asking[row, 0] == first - 1
        places = asked.places[row][asked.real[row]]
        assert (prompt.visual_index[row, places] == 0).all()


def test_a_cut_answer_asks_nothing(model, sample):
    batch = batch_of([sample(3, "image", 6)], [0])
    asked = Asked.of(model.build_prompt(*(batch[k] for k in ("input_ids", "attention_mask",
        "labels", "images"))))  # fmt: skip
    assert not asked.real.any()
    out = distillation(model)(**batch)
    assert [out[name].item() for name in ("loss", *PARTS)] == [0] * 4


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_is_the_mean_of_its_samples(make_model, sample, side):
    model = make_model(tokenizer_padding_side=side)
    rows = [sample(3, "image", 6, seed=1), sample(2, "image", "image", 9, seed=2), sample(9)]
    answers, training = [2, 4, 3], distillation(model)
    together = training(**batch_of(rows, answers, side))
    alone = [training(**batch_of([row], [n])) for row, n in zip(rows, answers, strict=True)]
    assert alone[2]["attn_kl"] == 0 and alone[0]["attn_kl"] > 0
    for name in ("ntp", "pred_kl"):
        wanted = sum(n * one[name] for n, one in zip(answers, alone, strict=True)) / sum(answers)
        torch.testing.assert_close(together[name], wanted, atol=1e-5, rtol=1e-4)
    wanted = sum(one["attn_kl"] for one in alone) / 3
    torch.testing.assert_close(together["attn_kl"], wanted, atol=1e-5, rtol=1e-4)


def test_any_backend_gives_the_same(make_model, sample):
    rows = [sample(3, "image", 6, seed=1), sample(9, seed=2)]
    found = []
    for backend in ("sdpa", "eager"):
        training = distillation(make_model(attn_implementation=backend))
        out = training(**batch_of(rows, [2, 3]))
        out["loss"].backward()
        found.append(out | {n: p.grad for n, p in training.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-5, rtol=1e-3)


def test_only_the_twig_and_its_gates_learn_also_without_an_image(model, sample):
    training = distillation(model)
    training(**batch_of([sample(9)], [3]))["loss"].backward()
    gradients = {name: p.grad for name, p in training.named_parameters()}
    assert len(gradients) == 2 * 9 + 2 + 2
    gates = [grad for name, grad in gradients.items() if "pruning_head" in name]
    assert len(gates) == 2 and not any(grad.any() for grad in gates)  # there, for other processes
    training.zero_grad()
    training(**batch_of([sample(3, "image", 6)], [3]))["loss"].backward()
    assert all(p.grad.any() for p in training.parameters())
    assert not any(p.requires_grad for p in model.parameters())


def test_attention_alone_teaches_the_layers_below_the_gates(model, sample):
    batch = batch_of([sample(3, "image", 6)], [3])
    training, gradients = distillation(model, alpha=0), []
    for gamma in (0.0, 1.0):
        training.weights.gamma = gamma
        training.zero_grad()
        out = training(**batch)
        out["loss"].backward()
        gradients.append(training.twig.layers[0].self_attn.k_proj.weight.grad.clone())
    assert not torch.allclose(*gradients, rtol=1e-3)
    assert out.keys() == {"loss", "ntp", "attn_kl"}  # nobody asks for the teacher's tokens


def test_a_copy_of_the_rest_of_the_model_predicts_as_it_does(model, sample):
    training = distillation(model, shared=1, layers=5)
    out = training(**batch_of([sample(3, "image", 6)], [3]))
    assert out["pred_kl"] < 1e-6


@pytest.mark.parametrize(("shared", "layer"), [(0, 0), (2, 1), (1, 5), (2, 2)])
def test_the_decoder_runs_once_as_far_as_it_is_needed(model, sample, shared, layer):
    batch = batch_of([sample(3, "image", 6)], [3])
    names = ("input_ids", "attention_mask", "labels", "images")
    with torch.no_grad():
        prompt = model.build_prompt(*(batch[name] for name in names))
        prefill = model.model.start(
            prompt.inputs_embeds, prompt.attention_mask, prompt.position_ids, prompt.visuals
        )
        states = model(
            **{k: batch[k] for k in ("input_ids", "attention_mask", "images")},
            output_hidden_states=True,
        ).hidden_states
        asked, step = Asked.of(prompt), model.model.prefill_step(prefill)
        ran = []
        hooks = [
            own.register_forward_hook(lambda *_, n=n: ran.append(n))
            for n, own in enumerate(model.model.layers)
        ]
        part = teach(model.model, prefill, step, asked, shared, layer, whole=False)
        assert ran == list(range(max(shared, layer))) and part.hidden is None
        whole = teach(model.model, prefill, step, asked, shared, layer)
        for hook in hooks:
            hook.remove()
    assert ran[max(shared, layer) :] == list(range(6))
    torch.testing.assert_close(whole.entered, states[shared])
    torch.testing.assert_close(model.model.norm(whole.hidden), states[-1])
    torch.testing.assert_close(part.scores, whole.scores)
    assert whole.scores.sum().item() == pytest.approx(1, abs=1e-5)


def test_the_teacher_s_layer_follows_the_depth():
    assert [attention_layer(depth) for depth in (32, 36, 28, 12)] == [19, 21, 17, 7]


@pytest.mark.parametrize("depth", range(1, 65))
def test_the_teacher_s_layer_sees_visual_tokens_in_the_pruned_model_too(depth):
    wipe = TwigVLMPlus().wipe_layer(depth)
    assert 0 <= attention_layer(depth) < wipe
    for last in range(1, depth + 1):
        assert attention_layer(depth, wipe=last) < last


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"temperature": 0.0}, "temperature .0.0. must be positive"),
        ({"clip": -1.0}, "clip .-1.0. must be positive"),
        ({"alpha": -0.1}, "alpha .-0.1. must not be negative"),
        ({"attention_layer": 6}, "attention_layer .6. must be one of the 6 decoder layers"),
    ],
)
def test_settings_that_mean_nothing_are_refused(model, weights, message):
    with pytest.raises(ValueError, match=message):
        distillation(model, **weights)
