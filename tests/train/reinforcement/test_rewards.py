"""Rewards: what answers get, what the judge is asked, and what happens when it does not answer."""

import math

import pytest
from urllib3.util import retry

from llava.judge import JudgeError
from llava.train.reinforcement.rewards import (
    Scorer,
    Wanted,
    check_judge,
    check_score_funcs,
    training_judge,
)
from tests.eval.stub_judge import stub_judge


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(retry.time, "sleep", lambda _: None)


def test_rewards_without_a_judge_are_those_of_the_text():
    box = "[10, 10, 20, 20]"
    wanted = [
        Wanted("?", "Yes", ("precision_match",)),
        Wanted("?", "B", ("single_choice",)),
        Wanted("?", box, ("one_box_iou", "one_box_format")),
        Wanted("?", box, ("one_box_iou", "one_box_format")),
    ]
    found = Scorer().scores(wanted, [" yes ", "(C)", "[10, 10, 20, 15]", f"{box} or {box}"])
    assert found == pytest.approx([1.0, 0.0, 1.5, 1.0])


def test_boxes_in_shares_are_rewarded_for_what_they_share():
    wanted = [Wanted("?", "[0.10, 0.20, 0.50, 0.60]", ("share_box_iou",))] * 3
    said = ["[0.10, 0.20, 0.50, 0.40]", "It is at (.1, .2, .5, .6).", "somewhere"]
    assert Scorer().scores(wanted, said) == pytest.approx([0.5, 1.0, 0.0], abs=1e-6)


def test_the_judge_is_asked_in_the_published_words_and_way():
    with stub_judge(["score: 0.75"]) as server:
        judge = training_judge("m", server.url)
        assert judge.timeout == 20
        assert Scorer(judge).scores([Wanted("What?", "a cat")], ["a dog"]) == [0.75]
    (body,) = server.requests
    assert body["temperature"] == 0 and body["model"] == "m"
    system, user = (message["content"] for message in body["messages"])
    assert system.startswith("\nYou are responsible for proofreading the answers")
    assert user == "\nquestion: What?\nstandard answer: a cat\nmodel's answer: a dog\n"
    assert server.headers["Authorization"] == "Bearer dummy"


def test_a_right_text_needs_no_judge():
    either = Wanted("?", "a cat", ("precision_match_or_llm",))
    with stub_judge(["score: 0.5"]) as server:
        found = Scorer(training_judge("m", server.url)).scores([either] * 2, ["A cat", "cats"])
    assert found == [1.0, 0.5] and len(server.requests) == 1


def test_an_answer_without_a_verdict_is_counted_told_and_no_zero(caplog):
    def reply(number, body):
        return (500, "out of memory") if "bad" in body["messages"][1]["content"] else "score: 1"

    with stub_judge(reply) as server:
        scorer = Scorer(training_judge("m", server.url))
        wanted = [Wanted("?", "a"), Wanted("?", "a", ("precision_match",)), Wanted("?", "a")]
        found = scorer.scores(wanted, ["bad", "a", "good"])
    assert math.isnan(found[0]) and found[1:] == [1.0, 1.0]
    assert (scorer.requests, scorer.failures) == (2, 1)
    assert "1 of 3 answers have no verdict and are left out" in caplog.text
    assert "out of memory" in caplog.text


def test_a_judge_that_is_gone_ends_the_training():
    with stub_judge(lambda n, b: (503, "gone") if n > 2 else "score: 1") as server:
        scorer = Scorer(training_judge("m", server.url), most_failures=4)
        wanted = [Wanted("?", "a")] * 3
        assert scorer.scores(wanted, ["a"] * 3) == [1.0] * 3
        assert all(map(math.isnan, scorer.scores(wanted, ["b"] * 3)))
        with pytest.raises(JudgeError, match="no verdict on 6 answers in a row, .*gone"):
            scorer.scores(wanted, ["c"] * 3)


def test_a_reply_that_names_no_score_is_a_zero():
    with stub_judge(["I like it"]) as server:
        scorer = Scorer(training_judge("m", server.url))
        assert scorer.scores([Wanted("?", "a")], ["a"]) == [0.0] and scorer.failures == 0


def test_the_judge_is_tried_before_anything_else():
    with stub_judge(["Sure! score: 1.0"]) as server:
        check_judge(training_judge("m", server.url))
    with stub_judge(["It is right."]) as server:
        with pytest.raises(JudgeError, match="scores a right answer with 'It is right.'"):
            check_judge(training_judge("m", server.url))
    with pytest.raises(JudgeError, match="no verdict from"):
        check_judge(training_judge("m", "http://127.0.0.1:9/v1"))


@pytest.mark.parametrize(
    "names, answer, message",
    [
        (("llm", "bleu"), "a", "d.jsonl: score_funcs bleu are unknown, choose from llm"),
        ((), "a", "d.jsonl names no score_funcs"),
        (("one_box_iou",), "a cat", "one_box_iou needs one box .* not 'a cat'"),
        (("one_box_iou",), "[0.1, 0.2, 0.3, 0.4]", "one_box_iou needs .* whole numbers, not"),
        (("share_box_iou",), "a cat", "share_box_iou needs a box .* not 'a cat'"),
    ],
)
def test_what_cannot_be_rewarded_is_told(names, answer, message):
    with pytest.raises(ValueError, match=message):
        check_score_funcs(names, answer, "d.jsonl")


def test_a_reward_that_needs_a_judge_says_so():
    with pytest.raises(ValueError, match="the reward llm needs a judge"):
        Scorer().scores([Wanted("?", "a")], ["a"])
