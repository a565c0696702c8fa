"""Advantages, masks and losses of the reinforcement, against numbers recorded from the release."""

import json
import math

import pytest
import torch

from llava.train.reinforcement.loss import (
    advantages,
    completion_mask,
    cut_to,
    distance_loss,
    mean_over_answers,
    packed,
    reward_loss,
)
from tests.paths import ROOT

RECORDED = json.loads((ROOT / "tests/golden/glimpseprune-qwen/utils.json").read_text())


def padded(rows):
    rows = [torch.tensor(row) for row in rows]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], True).bool()
    return torch.nn.utils.rnn.pad_sequence(rows, True), mask


def test_advantages_are_the_recorded_ones():
    case = RECORDED["grpo_advantage"]
    found = advantages(torch.tensor(case["scores"]), 4)
    assert found.tolist() == pytest.approx(case["out"], rel=1e-6)


def test_every_group_is_compared_with_itself():
    one, two = torch.tensor([0.2, 0.9, 0.9, 0.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    both = advantages(torch.cat([one, two]), 4)
    assert torch.equal(both[:4], advantages(one, 4))
    assert both[4:].tolist() == [0, 0, 0, 0]


def test_an_answer_without_a_verdict_is_worth_nothing_and_leaves_the_others_alone():
    found = advantages(
        torch.tensor([0.0, math.nan, 1.0, 0.5, math.nan, math.nan, 1.0, math.nan]), 4
    )
    rest = advantages(torch.tensor([0.0, 1.0, 0.5]), 3)
    assert found[[0, 2, 3]].tolist() == pytest.approx(rest.tolist())
    assert found[[1, 4, 5, 6, 7]].tolist() == [0] * 5


def test_losses_and_their_gradient_are_the_recorded_ones():
    case = RECORDED["grpo_losses"]
    log_probs, mask = padded(case["completion_logps"])
    reference, _ = padded(case["ref_completion_logps"])
    worth = torch.tensor(case["advantages"])
    log_probs.requires_grad_()
    distance = case["kd_weight"] * distance_loss(log_probs, reference, mask)
    reward = case["reward_weight"] * reward_loss(log_probs, worth, mask)
    assert distance.item() == pytest.approx(case["kd_loss"], rel=1e-5)
    assert reward.item() == pytest.approx(case["reward_loss"], rel=1e-5)
    (distance + reward).backward()
    for row, wanted in zip(log_probs.grad, case["grad_of_sum_wrt_logps"], strict=True):
        assert row[: len(wanted)].tolist() == pytest.approx(wanted, rel=1e-4)
        assert not row[len(wanted) :].any()


def test_an_answer_ends_at_its_first_end_mark_or_not_at_all():
    case = RECORDED["completion_mask"]
    found = completion_mask(torch.tensor(case["completion_ids"]), [case["eos"]])
    assert found.long().tolist() == case["out"]
    assert found[2].all()  # no end mark: every token counts
    either = completion_mask(torch.tensor([[5, 9, 7], [5, 6, 2]]), [2, 9])
    assert either.long().tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("case", RECORDED["left_padding"]["cases"], ids=str)
def test_prompts_and_answers_are_packed_as_recorded_but_every_row_is_cut_by_itself(case):
    rows = RECORDED["left_padding"]
    ids, valid = torch.tensor(rows["input_ids"]), torch.tensor(rows["attention_mask"]).bool()
    answer = torch.tensor(rows["completion_mask"]).bool()
    prompt = valid[:, : -answer.shape[1]]
    answer = cut_to(case["max_seq_length"], prompt.sum(dim=1), answer)
    order, there = packed(torch.cat([prompt, answer], dim=1))
    assert (ids.gather(1, order) * there).tolist() == case["input_ids"]
    assert there.long().tolist() == case["attention_mask"]
    found = torch.cat([torch.zeros_like(prompt), answer], dim=1).gather(1, order)
    # The release takes from every row what the longest one is too long by.
    wanted = [list(row) for row in case["completion_mask"]]
    if case["max_seq_length"] is not None:
        wanted[0] = {6: [0, 0, 0, 1, 1, 1], 5: [0, 0, 0, 1, 1]}[case["max_seq_length"]]
    assert found.long().tolist() == wanted


def test_a_prompt_is_never_cut_however_short_the_limit():
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert cut_to(4, torch.tensor([9, 2]), mask).long().tolist() == [[0, 0, 0], [1, 1, 0]]


def test_a_long_answer_counts_as_much_as_a_short_one():
    values, mask = padded([[1.0], [3.0, 3.0, 3.0]])
    assert mean_over_answers(values, mask) == 2
