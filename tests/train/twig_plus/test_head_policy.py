"""Stage 2: what selections cost, and that the gates alone learn from them."""

import pytest
import torch
import torch.nn.functional as F

from llava.constants import IGNORE_INDEX
from llava.pruning import build_pruner
from llava.pruning.twigvlm import grow_twig
from llava.pruning.twigvlm_plus import GatedTwig, TwigVLMPlus
from llava.train.twig_plus.policy import (
    Cuts,
    HeadReinforcement,
    Reinforcement,
    Sample,
    answer_costs,
)
from tests.train.twig_plus.test_distillation import batch_of

SETTINGS = {"num_groups": 6, "attention_layer": 3}
NAMES = ("input_ids", "attention_mask", "labels", "images")


def reinforcement(model, first=1, wipe=4, **settings):
    torch.manual_seed(0)
    twig = grow_twig(model, first, 2, GatedTwig)
    return HeadReinforcement(
        model, twig, Cuts(first, wipe), Reinforcement(**{**SETTINGS, **settings})
    )


@pytest.fixture(autouse=True)
def trainable_again(model):
    yield
    model.requires_grad_(True)


def sample_of(training, batch, row=0):
    with torch.no_grad():
        prompt = training.trunk.build_prompt(*(batch[name] for name in NAMES))
        return Sample.of(prompt, row, training.trunk.model)


class Chosen(TwigVLMPlus):
    """Keeps given visual tokens in place of the best ones."""

    def score(self, prefill):
        return self.given


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("wipe", [4, 6])
def test_a_selection_costs_what_the_pruned_model_says(model, sample, first, wipe):
    """By the method itself, one selection at a time, with the answer in the prompt."""
    batch = batch_of([sample(3, "image", 6, seed=1)], [3])
    training = reinforcement(model, first, wipe)
    one = sample_of(training, batch)
    entered, _, _ = training.scored(one)
    chosen = torch.tensor([[5, 2, 30], [7, 8, 9], [35, 0, 1]])
    costs, count = training.costs(one, entered, chosen)
    assert count == 3
    for own, cost in zip(chosen, costs, strict=True):
        pruner = Chosen(twig_K=first, final_wipe_layer=wipe, visual_token_num=7)
        pruner.module = training.twig
        pruner.kept_tokens = lambda total, *_: torch.full_like(total, 3)
        pruner.given = torch.zeros(1, entered.shape[1])
        pruner.given[0, one.asked.places[0][own]] = 1.0
        model.pruner = pruner
        prompt = model.build_prompt(*(batch[name] for name in NAMES))
        out = model(
            inputs_embeds=prompt.inputs_embeds,
            attention_mask=prompt.attention_mask,
            position_ids=prompt.position_ids,
            visuals=prompt.visuals,
            labels=prompt.labels,
        )
        torch.testing.assert_close(3 * out.loss, 3 * cost, atol=1e-4, rtol=1e-4)
    model.pruner = build_pruner("none")


def test_later_questions_count_in_the_length_of_an_answer(model, sample):
    batch = batch_of([sample(3, "image", 9, seed=1)], [8])
    training = reinforcement(model)
    chosen = torch.tensor([[1, 2], [3, 4]])
    whole = sample_of(training, batch)
    entered = training.scored(whole)[0]
    before, _ = training.costs(whole, entered, chosen)
    batch["labels"][0, -4:-2] = IGNORE_INDEX
    parts = sample_of(training, batch)
    after, count = training.costs(parts, entered, chosen)
    assert count == 6 and (after < before).all()


def test_logits_are_held_a_few_rows_at_a_time(model, monkeypatch):
    hidden, targets = torch.randn(5, 4, 32), torch.randint(0, 90, (4,))
    with torch.no_grad():
        whole = answer_costs(model, hidden, targets)
        asked, logits_of = [], model.logits_of
        monkeypatch.setattr(model, "logits_of", lambda x: asked.append(len(x)) or logits_of(x))
        monkeypatch.setattr("llava.train.twig_plus.policy.LOGITS_HELD", 2 * 4 * 90)
        torch.testing.assert_close(answer_costs(model, hidden, targets), whole)
    assert asked == [2, 2, 1]
    wanted = F.cross_entropy(logits_of(hidden[1]), targets, reduction="sum")
    torch.testing.assert_close(whole[1], wanted.detach())


def test_only_the_gates_learn_and_draws_depend_on_the_key_alone(model, sample):
    batch = batch_of([sample(3, "image", 6, seed=1), sample(2, "image", 9, seed=2)], [2, 4])
    training = reinforcement(model)
    first, again, other = (training(**batch, key=(key,)) for key in (1, 1, 2))
    assert first["loss"] == again["loss"] != other["loss"]
    first["loss"].backward()
    assert {name for name, _ in training.named_parameters()} == {
        "head.q_gate.weight",
        "head.k_gate.weight",
    }
    assert all(p.grad.any() for p in training.parameters())
    frozen = [*model.parameters(), *training.twig.layers.parameters()]
    assert not any(p.requires_grad or p.grad is not None for p in frozen)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_is_the_mean_of_its_samples_that_can_be_judged(make_model, sample, side):
    model = make_model(tokenizer_padding_side=side)
    rows = [sample(9), sample(3, "image", 6, seed=1), sample(2, "image", "image", 9, seed=2)]
    training = reinforcement(model)
    out = training(**batch_of(rows, [3, 2, 4], side), key=(5,))
    with torch.no_grad():
        batch = batch_of(rows, [3, 2, 4], side)
        samples = [sample_of(training, batch, row) for row in range(3)]
    assert [one.usable for one in samples] == [False, True, True]
    alone = [training.of_sample(one, 0.0, (5, row)) for row, one in enumerate(samples) if row]
    wanted = torch.stack([one["loss"] for one in alone]).mean()
    torch.testing.assert_close(out["loss"], wanted, atol=1e-5, rtol=1e-5)
    assert out["kept"] == sum(one["kept"] for one in alone) / 2
    nothing = training(**batch_of(rows[:1], [3], side))
    nothing["loss"].backward()
    assert nothing.keys() == {"loss"} and not any(p.grad.any() for p in training.parameters())


def test_any_backend_gives_the_same(make_model, sample):
    batch = batch_of([sample(3, "image", 6, seed=1)], [3])
    found = []
    for backend in ("sdpa", "eager"):
        training = reinforcement(make_model(attn_implementation=backend))
        out = training(**batch, key=(3,))
        out["loss"].backward()
        found.append([out["loss"], out["cost"], *(p.grad for p in training.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_without_the_divergence_no_layer_of_the_teacher_runs(model, sample):
    batch = batch_of([sample(3, "image", 6, seed=1)], [3])
    ran = []
    hooks = [
        layer.register_forward_hook(lambda *_, n=n: ran.append(n))
        for n, layer in enumerate(model.model.layers)
    ]
    out = reinforcement(model, kl=0.0)(**batch)
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 2, 3, 4, 5]  # once for the sample, the others once for the group
    assert "attn_kl" not in out and out["loss"] == out["policy"]


def test_the_head_learns_to_keep_what_the_answer_needs(model, sample):
    """Two of the visual tokens make the answer likely; the head finds them."""
    batch = batch_of([sample(3, "image", 6, seed=1)], [3])
    training = reinforcement(model, kl=0.0, num_groups=16)
    one = sample_of(training, batch)
    useful = torch.zeros(36)
    useful[[4, 20]] = 1.0
    training.costs = lambda sample, entered, chosen: (-useful[chosen].sum(dim=1), 3)
    optimizer = torch.optim.Adam(training.parameters(), lr=0.03)
    before = training.scored(one)[2]
    for step in range(60):
        optimizer.zero_grad()
        training.of_sample(one, 1.0, (step,))["loss"].backward()
        optimizer.step()
    after = training.scored(one)[2]
    assert after[[4, 20]].sum() > 3 * before[[4, 20]].sum()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_groups": 1}, "num_groups .1. must be at least 2"),
        ({"kl": -1.0}, "kl .-1.0. and beta_max"),
        ({"attention_layer": 9}, "attention_layer .9. must be one of the 6"),
    ],
)
def test_settings_that_mean_nothing_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        reinforcement(model, **settings)
