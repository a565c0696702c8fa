"""Kept tokens per question: average, share and spread, as the summary of a benchmark shows them."""

import json

import pytest

from llava.eval import score_table
from llava.eval.files import budgets


def answers(*kept, unpruned=576, at_end=None):
    """Answer lines of questions that kept so many tokens, in all layers unless told otherwise."""
    return [
        {
            "metadata": {
                "visual_tokens": n,
                "visual_tokens_at_end": n if at_end is None else at_end,
                "visual_tokens_unpruned": unpruned,
            }
        }
        for n in kept
    ]


def test_the_average_the_share_and_the_spread_are_those_of_the_questions():
    result = budgets.summarize(answers(0, 144, 288, 576))
    assert result["mean"] == 252 and result["ratio"] == pytest.approx(252 / 576)
    assert (result["min"], result["median"], result["max"]) == (0, 216, 576)
    assert result["histogram"] == [1, 0, 1, 0, 0, 1, 0, 0, 0, 1] and result["count"] == 4


def test_the_share_is_the_mean_of_shares_where_images_differ_in_size():
    result = budgets.summarize(answers(100, unpruned=200) + answers(100, unpruned=400))
    assert result["mean"] == 100 and result["ratio"] == pytest.approx(0.375)


def test_answers_without_an_image_or_from_elsewhere_have_no_budget():
    assert budgets.summarize([{"metadata": {}}, {}]) is None
    text_only = [{"metadata": {"visual_tokens": 0, "visual_tokens_unpruned": 0}}]
    assert budgets.summarize(text_only) is None
    assert budgets.summarize(text_only + answers(64))["count"] == 1


def test_the_spread_is_shown_only_where_there_is_one():
    same = budgets.report(budgets.summarize(answers(64, 64)))
    assert same == "Visual tokens per layer: 64.0 on average (11.1 % of all)\n"
    different = budgets.report(budgets.summarize(answers(*range(0, 101, 10))))
    assert "min 0.0, p10 10.0, median 50.0, p90 90.0, max 100.0" in different
    assert "by tenth of all tokens: 6 5 0 0 0 0 0 0 0 0\n" in different


def test_what_is_left_in_the_last_layer_is_told_from_the_average_over_layers():
    summary = budgets.summarize(answers(200, 300, unpruned=500, at_end=50))
    assert summary["ratio"] == 0.5 and summary["at_end"]["ratio"] == pytest.approx(0.1)
    assert budgets.report(summary) == (
        "Visual tokens per layer: 250.0 on average (50.0 % of all)\n"
        "Visual tokens in the last layer: 50.0 on average (10.0 % of all)\n"
    )


def test_the_table_has_a_row_per_benchmark_and_the_mean_of_a_family():
    row = {"metric": "accuracy", "count": 5, "visual_tokens": {"mean": 42.25}}
    text = score_table.table(
        [
            {"benchmark": "gqa", "score": 61.234} | row,
            {"benchmark": "vizwiz", "score": None, "upload": "x.json"} | row,
            {"benchmark": "qbench_test", "score": None, "why": "answers not public"} | row,
            {"benchmark": "mmvet", "score": None, "why": "no judge"} | row,
            {"benchmark": "viscot_gqa", "score": 50.0} | row,
            {"benchmark": "viscot_cub", "score": 70.0} | row,
        ]
    )
    assert text.splitlines()[2:] == [
        "| gqa | accuracy | 61.23 | 5 | 42.2 |",
        "| vizwiz | accuracy | by its server | 5 | 42.2 |",
        "| qbench_test | accuracy | answers not public | 5 | 42.2 |",
        "| mmvet | accuracy | no judge | 5 | 42.2 |",
        "| viscot_gqa | accuracy | 50.00 | 5 | 42.2 |",
        "| viscot_cub | accuracy | 70.00 | 5 | 42.2 |",
        "| viscot, mean | accuracy | 60.00 | 10 |  |",
    ]


#: as earlier versions wrote them: parts under other names or none, no reason for a missing score
EARLIER = {
    "pope": {"score": 86.2, "percent": 86.2, "count": 9, "categories": {"random": {"f1": 0.862}}},
    "gqa": {"score": 61.9, "percent": 61.9, "count": 7, "binary": 70.1, "open": 50.0},
    "mme": {"score": 1480.5, "percent": 74.0, "count": 8, "groups": {"OCR": 140.0}},
    "seed": {"score": 58.6, "count": 6, "scores": {"total": 58.6}, "visual_tokens": 192.0},
    "mmvet": {"score": None, "percent": None, "count": 5},
    "sqa": {"score": 66, "count": 4, "visual_tokens": None, "failed": 0},
}


def test_score_files_of_earlier_versions_keep_their_numbers_in_the_table(tmp_path):
    paths = []
    for name, result in EARLIER.items():
        paths.append(tmp_path / f"{name}.score.json")
        paths[-1].write_text(json.dumps({"benchmark": name, "metric": "m"} | result))
    lines = score_table.table([score_table.read_score(str(path)) for path in paths]).splitlines()
    assert lines[2:] == [
        "| pope | m | 86.20 | 9 |  |",
        "| gqa | m | 61.90 | 7 |  |",
        "| mme | m | 1480.50 | 8 |  |",
        "| seed | m | 58.60 | 6 | 192.0 |",
        "| mmvet | m | not scored | 5 |  |",
        "| sqa | m | 66.00 | 4 |  |",
    ]


NO_SCORES = {
    "no field 'count'": {"benchmark": "gqa", "metric": "m", "score": 1.0},
    "'score' is a text": {"benchmark": "gqa", "metric": "m", "score": "61.9 %", "count": 3},
    "'count' is null": {"benchmark": "gqa", "metric": "m", "score": 61.9, "count": None},
    "no field 'metric', 'score', 'count'": {"benchmark": "gqa", "accuracy": 61.9},
}


@pytest.mark.parametrize("reason", NO_SCORES)
def test_a_file_that_is_no_score_is_named_with_what_is_wrong(reason, tmp_path):
    path = tmp_path / "x.score.json"
    path.write_text(json.dumps(NO_SCORES[reason]))
    with pytest.raises(ValueError, match=f"x.score.json: {reason}, so it is no score"):
        score_table.read_score(str(path))
