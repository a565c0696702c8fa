"""Budgets of a comparison: numbers, shares, all tokens."""

import argparse

import pytest

from llava.eval.compare import suite
from llava.eval.compare.budget import Budget, budget_of
from tests.eval import mini_benchmark

WORDS = {
    "64": Budget(tokens=64),
    "0.222": Budget(share=0.222),
    ".5": Budget(share=0.5),
    "1.0": Budget(),
    "1": Budget(tokens=1),
}


@pytest.mark.parametrize("word", WORDS)
def test_a_decimal_point_makes_a_share(word):
    assert budget_of(word) == WORDS[word]


@pytest.mark.parametrize("word", ["0", "-3", "0.0", "1.5", "64.0", "many", "nan", "1e-3", ".", ""])
def test_what_is_no_budget_is_refused(word):
    with pytest.raises(argparse.ArgumentTypeError, match="neither a number of tokens such as 64"):
        budget_of(word)


def test_a_budget_is_called_alike_everywhere():
    share, number, whole = Budget(share=0.222), Budget(64), Budget()
    assert [str(b) for b in (share, number, whole)] == ["0.222", "64", "all"]
    assert [b.label for b in (share, number, whole)] == ["22.2 %", "64", "all"]
    assert [b.title for b in (share, number)] == ["22.2 % of the tokens", "64 tokens"]
    assert [b.of(600) for b in (share, number, whole)] == [pytest.approx(133.2), 64, 600]
    ordered = sorted([number, whole, Budget(128), share], key=lambda b: b.order, reverse=True)
    assert ordered == [whole, share, Budget(128), number]


def test_a_method_without_shares_says_so_and_the_others_take_them(tmp_path):
    args = mini_benchmark.suite_args(tmp_path, [64], methods=["prumerge", "pool"], pruning_arg=[])
    args.tokens = [Budget(share=0.222), Budget(), Budget(700), Budget(64)]
    runs = {(run.method, str(run.budget)): run for run in suite.plan(args, num_tokens=576)}
    assert list(runs) == [
        ("none", "576"),
        *(("prumerge", "0.222"), ("prumerge", "700"), ("prumerge", "64")),
        *(("pool", "0.222"), ("pool", "700"), ("pool", "64")),
    ]
    assert runs["pool", "700"].refused == "an image has 576 tokens"
    refused = runs["prumerge", "0.222"].refused
    assert refused == "its budget is a number of tokens, it takes no share of them"
    assert runs["pool", "0.222"].pruner.visual_token_ratio == 0.222
    assert runs["pool", "64"].refused is None
    runs = suite.plan(args, num_tokens=None)  # images of any size: no number is all tokens
    assert [str(run.budget) for run in runs[:4]] == ["all", "0.222", "700", "64"]
