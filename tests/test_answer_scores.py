"""Scores of free-form answers, against numbers recorded from the release."""

import json

import pytest

from llava.answer_scores import (
    box_iou,
    first_box,
    judged_score,
    one_box_format,
    precision_match,
    single_choice,
)
from tests.paths import ROOT

RECORDED = json.loads((ROOT / "tests/golden/glimpseprune-qwen/utils.json").read_text())


@pytest.mark.parametrize("case", RECORDED["extract_score"], ids=lambda case: case["text"])
def test_a_verdict_gives_the_recorded_score(case):
    # A period behind the number, which broke the release, ends the sentence.
    wanted = {"The score: 0.5.": 0.5, "score: 0.6.": 0.6}.get(case["text"], case["out"])
    assert judged_score(case["text"]) == wanted


@pytest.mark.parametrize("case", RECORDED["precision_match_train"], ids=str)
def test_texts_are_equal_up_to_case_and_surrounding_space(case):
    assert precision_match(case["completion"], case["answer"]) == case["out"]


@pytest.mark.parametrize("case", RECORDED["single_choice"], ids=str)
def test_an_option_is_found_by_its_letter(case):
    assert single_choice(case["response"], case["answer"]) == case["out"]


@pytest.mark.parametrize("case", RECORDED["extract_one_bbox"], ids=lambda case: case["text"])
def test_the_first_box_of_a_text_is_read(case):
    assert list(first_box(case["text"])) == case["out"]


@pytest.mark.parametrize("case", RECORDED["one_box_format"], ids=lambda case: case["text"])
def test_an_answer_of_one_box_holds_exactly_one(case):
    assert one_box_format(case["text"]) == case["out"]


def test_boxes_overlap_as_recorded():
    rows = RECORDED["paired_ious"]
    found = [box_iou(*pair) for pair in zip(rows["pred"], rows["gt"], strict=True)]
    assert found == pytest.approx(rows["out"])
