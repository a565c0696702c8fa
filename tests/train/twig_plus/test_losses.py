"""The losses of both stages, on numbers small enough to check."""

import itertools
import math

import pytest
import torch

from llava.train.twig_plus.losses import (
    RELEASED_KEPT,
    budget_chances,
    candidates,
    divergence_weight,
    draw_in_order,
    log_chances,
    prediction_loss,
    score_divergence,
    token_divergences,
    worth,
)


def test_a_token_s_divergence_is_that_of_the_softened_distributions():
    teacher, student = torch.randn(2, 3, 7)
    b, p = ((logits / 2).softmax(-1) for logits in (teacher, student))
    wanted = 4 * (b * (b / p).log()).sum(-1)
    torch.testing.assert_close(token_divergences(teacher, student, 2.0), wanted)
    assert not token_divergences(teacher, teacher, 5.0).abs().max() > 1e-5


def test_above_the_ceiling_the_value_stands_still_and_the_gradient_shrinks():
    own = torch.tensor([1.0, 8.0], requires_grad=True)
    loss = prediction_loss(own, 4.0)
    assert loss.item() == pytest.approx((1 / 4 + 1) / 2)
    loss.backward()
    assert own.grad.tolist() == pytest.approx([1 / 8, 1 / 8 * 4 / 8])
    assert prediction_loss(torch.zeros(0), 4.0).item() == 0
    assert prediction_loss(torch.tensor([-1e-9, 0.0]), 4.0).item() == pytest.approx(0, abs=1e-8)


def test_padding_adds_nothing_to_the_divergence_of_scores():
    teacher = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])
    student = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    real = torch.tensor([[True, True, False], [False, False, False]])
    own = score_divergence(teacher, student, real)
    wanted = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert own.tolist() == pytest.approx([wanted, 0], abs=1e-6)
    own.sum().backward()
    assert student.grad.isfinite().all() and not student.grad[1].any()


def test_the_chance_of_an_order_is_that_of_drawing_and_renormalising():
    torch.manual_seed(0)
    scores = torch.randn(5).softmax(0).double().requires_grad_()
    orders = list(itertools.permutations(range(5), 3))
    own = log_chances(scores, torch.tensor(orders))
    for order, value in zip(orders, own, strict=True):
        left, chance = scores.detach().clone(), 1.0
        for token in order:
            chance *= (left[token] / left.sum()).item()
            left[token] = 0
        assert value.item() == pytest.approx(math.log(chance))
    assert own.exp().sum().item() == pytest.approx(1)  # one of them is drawn
    whole = log_chances(scores, torch.tensor(list(itertools.permutations(range(5)))))
    assert whole.exp().sum().item() == pytest.approx(1)
    whole.sum().backward()
    assert scores.grad.isfinite().all()


def test_a_score_of_nearly_one_leaves_the_others_their_chances():
    scores = torch.tensor([1 - 2e-9, 1e-9, 1e-9], requires_grad=True)
    own = log_chances(scores, torch.tensor([[0, 1], [1, 0]]))
    assert own.tolist() == pytest.approx([math.log(0.5), math.log(1e-9)], abs=1e-4)
    own.sum().backward()
    assert scores.grad.isfinite().all()


def test_draws_follow_the_scores():
    torch.manual_seed(0)
    scores, count = torch.tensor([0.5, 0.3, 0.2, 0.0]), 20_000
    noise = -(-torch.rand(count, 4).log()).log()
    drawn = draw_in_order(scores, 2, noise)
    orders = torch.tensor([[0, 1], [1, 0], [0, 2], [2, 0], [1, 2], [2, 1]])
    for order, chance in zip(orders, log_chances(scores, orders).exp(), strict=True):
        share = (drawn == order).all(dim=1).float().mean()
        assert abs(share - chance) < 4 * (0.25 / count) ** 0.5
    assert draw_in_order(scores, 4, noise[:5]).sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 5


def test_equal_costs_are_worth_nothing_and_low_ones_much():
    assert worth(torch.full((4,), 2.5)).tolist() == [0] * 4
    assert worth(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx([1, 0, -1], abs=1e-5)


def test_budgets_are_alike_at_first_and_the_smallest_in_the_end():
    assert budget_chances(7, 0, 8, 2).tolist() == pytest.approx([1 / 7] * 7)
    half, end = budget_chances(7, 0.5, 8, 2), budget_chances(7, 1, 8, 2)
    assert (half[1] / half[0]).item() == pytest.approx(math.exp(-2))
    assert end[0] > 0.999 and budget_chances(7, 3, 8, 2).tolist() == end.tolist()


def test_the_budgets_of_a_7b_model_are_the_released_ones_and_others_have_their_share():
    assert candidates(576, 2, 24, 32) == list(RELEASED_KEPT)
    assert candidates(2880, 2, 24, 32) == [5 * kept for kept in RELEASED_KEPT]
    assert candidates(100, 2, 24, 32) == [8, 13, 18, 24, 29, 35, 40]  # rounded up
    playground = candidates(576, 0, 4, 6)
    assert [kept * 4 / 6 for kept in playground] == pytest.approx(
        [64.2, 85.5, 106.8, 128.1, 149.4, 170.8, 192.1], abs=1
    )
    assert candidates(10, 0, 4, 6)[0] >= 1 and candidates(4, 3, 4, 6) == [1]


def test_the_weight_of_the_divergence_grows_with_the_budget():
    assert divergence_weight(41, 41, 227) == 1 and divergence_weight(227, 41, 227) == 4
    assert divergence_weight(72, 41, 227, squared=False) == pytest.approx(1 + 31 / 186)
    assert divergence_weight(5, 5, 5) == 1
