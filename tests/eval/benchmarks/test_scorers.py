"""Every scorer and converter reproduces the recorded reference, digit for digit."""

import json

import pytest

from llava.eval.answering.questions import subset
from llava.eval.benchmarks import gqa as eval_gqa
from llava.eval.benchmarks import mmbench as eval_mmbench
from llava.eval.benchmarks import mme as eval_mme
from llava.eval.benchmarks import pope as eval_pope
from llava.eval.benchmarks import qbench as eval_qbench
from llava.eval.benchmarks import refcoco as eval_refcoco
from llava.eval.benchmarks import seed as eval_seed
from llava.eval.benchmarks import vizwiz as eval_vizwiz
from llava.eval.benchmarks import vqav2 as eval_vqav2
from llava.eval.scoring.m4c import (
    EvalAIAnswerProcessor,
    STVQAAccuracyEvaluator,
    STVQAANLSEvaluator,
    TextVQAAccuracyEvaluator,
)
from tests.eval import eval_cases, mini_benchmark
from tests.paths import GOLDEN

RECORDED = GOLDEN / "llava-base"
CASES = [
    case
    for name in ("scripts", "sqa_conversion", "gpt_review")
    for case in json.loads((RECORDED / f"scoring_{name}.json").read_text(encoding="utf-8"))
]
M4C = json.loads((RECORDED / "scoring_m4c.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_scores_and_files_equal_the_recorded_ones(case, tmp_path):
    if "xlsx" in str(case["outputs"]):
        pytest.importorskip("openpyxl")
    assert not eval_cases.differences(case, tmp_path)


@pytest.mark.parametrize("stage", ["out", "word_tokenize", "punct"])
def test_normalised_answers_equal_the_recorded_ones(stage):
    processor = EvalAIAnswerProcessor()
    stages = {
        "out": processor,
        "word_tokenize": processor.word_tokenize,
        "punct": lambda text: processor.process_punctuation(
            processor.word_tokenize(text).replace("\n", " ").replace("\t", " ").strip()
        ),
    }
    wrong = [c for c in M4C["normalise"] if stages[stage](c["in"]) != c[stage]]
    assert not wrong


def test_soft_accuracies_equal_the_recorded_ones():
    evaluator = TextVQAAccuracyEvaluator()
    for case in M4C["textvqa_scores"]:
        assert evaluator.answer_scores(case["gts"]) == case["unique_scores"]
        assert evaluator.score(case["pred"], case["gts"]) == case["score"]
    entries = [{"pred_answer": c["pred"], "gt_answers": c["gts"]} for c in M4C["textvqa_scores"]]
    assert evaluator.eval_pred_list(entries) == M4C["textvqa_mean_of_all"]


def test_scene_text_scores_equal_the_recorded_ones():
    for case in M4C["stvqa"]:
        assert STVQAAccuracyEvaluator().score(case["pred"], case["gts"]) == case["acc"]
        assert STVQAANLSEvaluator().score(case["pred"], case["gts"]) == case["anls"]


def test_other_than_ten_human_answers_are_an_error():
    with pytest.raises(ValueError, match="expected 10 human answers, got 3"):
        TextVQAAccuracyEvaluator().score("a", ["a", "b", "c"])


def test_pope_rates_over_nothing_are_zero():
    result = eval_pope.rates((1, 2, 0, 0, 1))  # of two answers, one that missed a yes
    assert result["precision"] == result["recall"] == result["f1"] == result["yes_ratio"] == 0
    assert result["accuracy"] == 0.5


def test_gqa_names_a_question_without_prediction():
    question = {"isBalanced": True, "answer": "yes"}
    with pytest.raises(ValueError, match="1 questions lack a prediction, e.g. 7"):
        eval_gqa.units({"7": question}, [])


def test_mme_needs_both_answers_on_an_image_for_the_second_half_of_the_score():
    lines = ["a.txt\tq\tYes\tyes", "a.txt\tq\tNo\tYes", "b.txt\tq\tYes\tyes.", "b.txt\tq\tNo\tno"]
    assert eval_mme.units({"count": lines}).result()["score"] == 75 + 50


def test_vqav2_gives_a_third_for_every_human_that_agrees():
    humans = {1: ["red"] * 3 + ["blue"] * 7}
    answers = [{"question_id": 1, "text": "Red."}]
    assert eval_vqav2.units(humans, answers).percent == pytest.approx(90)


def test_refcoco_compares_in_the_padded_square():
    record = {"question_id": 1, "bbox": [0, 0, 200, 100], "width": 200, "height": 100}
    right = [{"question_id": 1, "text": "[0.00, 0.25, 1.00, 0.75]"}]
    assert "Mean IoU: 1.0000" in eval_refcoco.report(eval_refcoco.units([record], right))
    unpadded = [{"question_id": 1, "text": "It is at [0.0, 0.0, 1.0, 1.0]."}]
    assert eval_refcoco.units([record], unpadded).percent == 100  # IoU is exactly one half
    none = eval_refcoco.units([record], [{"question_id": 1, "text": "left"}])
    assert none.percent == 0 and "without a box: 1\n" in eval_refcoco.report(none)
    assert none.result()["unreadable"] == 1 and none.result()["mean_iou"] == 0


def test_refcoco_compares_boxes_in_pixels_in_the_image_that_qwen_sees():
    record = {"question_id": 1, "bbox": [64, 48, 320, 240], "width": 640, "height": 480}
    seen = [{"question_id": 1, "text": '[{"bbox_2d": [64, 48, 322, 238], "label": "dog"}]'}]
    units = eval_refcoco.units([record], seen)  # of 644 x 476 pixels
    assert units.percent == 100 and units.result()["mean_iou"] > 0.98
    assert "with one in pixels: 1\n" in eval_refcoco.report(units)


PROGRAMS = {
    eval_mmbench: ("mmbench/mmbench_dev_20230712.tsv", "A", "  c: 100.00%"),
    eval_refcoco: ("refcoco/refcoco_val.jsonl", "[0, 0, 0.03, 0.03]", "Acc@0.5: 100.00%"),
    eval_vqav2: ("vqav2/v2_mscoco_val2014_annotations.json", "yes", "Accuracy: 100.00%"),
}


@pytest.mark.parametrize("scorer", PROGRAMS, ids=lambda scorer: scorer.__name__)
def test_a_scorer_reads_the_files_it_is_given(scorer, tmp_path, monkeypatch, capsys):
    truth, text, last_line = PROGRAMS[scorer]
    truth = mini_benchmark.build(tmp_path / "data") / truth
    answer = {"question_id": 1, "text": text, "options": ["red", "blue"], "option_char": "AB"}
    (tmp_path / "a.jsonl").write_text(json.dumps(answer))
    words = ["--annotation-file", str(truth), "--result-file", str(tmp_path / "a.jsonl")]
    monkeypatch.setattr("sys.argv", ["scorer", *words])
    scorer.main()
    assert capsys.readouterr().out.splitlines()[-1] == last_line
    (tmp_path / "a.jsonl").write_text('{"question_id": 1}')
    with pytest.raises(SystemExit, match="a.jsonl, line 1: no field 'text'"):
        scorer.main()


def test_a_limit_keeps_pairs_of_neighbours_and_spreads_them():
    assert subset(list(range(100)), 4) == [0, 1, 50, 51]
    assert subset(list(range(3)), 10) == [0, 1, 2]
    assert len(set(subset(list(range(301)), 100))) == 100
    with pytest.raises(ValueError, match="limit of 0"):
        subset([1, 2], 0)


def test_vizwiz_answers_meet_their_image_and_unanswerable_ones_are_counted():
    humans = {"a.jpg": ["cat"] * 10, "b.jpg": ["unanswerable"] * 2 + ["dog"] * 8}
    questions = [{"question_id": 7, "image": "b.jpg"}, {"question_id": 8, "image": "a.jpg"}]
    answers = [{"question_id": 7, "text": "Unanswerable"}, {"question_id": 8, "text": "Cat."}]
    units = eval_vizwiz.units(humans, questions, answers)
    # two of ten said so: a held-out one leaves 1 of 3, the other eight leave 2 of 3
    assert units.percent == pytest.approx(100 * (1 + (2 / 3 * 8 + 1 / 3 * 2) / 10) / 2)
    assert "Answered 'unanswerable': 50.00%" in eval_vizwiz.report(units) and units.count == 2
    assert units.result()["said_unanswerable"] == 50
    with pytest.raises(ValueError, match="question 9: no annotation"):
        eval_vizwiz.units(humans, questions, [{"question_id": 9, "text": "x"}])


def test_qbench_takes_the_letter_or_the_words_of_an_option():
    record = {"question": "?", "candidates": ["Yes", "No"], "correct_ans": "No", "type": 0}
    texts = ["B", "B. No", "No.", "A", "Perhaps"]
    records = [record | {"img_path": f"{number}.jpg"} for number in range(5)]
    answers = [r | {"text": text} for r, text in zip(records, texts, strict=True)]
    units = eval_qbench.units(records, answers[::-1])
    assert units.percent == 60 and units.by_group()["type: yes or no"].percent == 60


@pytest.mark.parametrize(
    "lang, text",
    [
        ("en", "Q?\nChoose between one of the options as follows:\nA. x\nB. y\n"),
        ("zh", "Q?\n在下列选项中选择一个:\nA. x\nB. y\n"),
    ],
)
def test_qbench_questions_have_the_published_wording_and_lines_repeat_the_record(lang, text):
    record = {"question": "Q?", "img_path": "1.jpg", "candidates": ["x", "y"], "type": 2}
    (question,) = eval_qbench.qbench_questions(record, lang)
    assert question.text == text
    line = question.answer_line("A", "id", "m")
    assert line.items() >= (record | {"response": "A"}).items()


def test_seed_counts_an_unanswered_question_as_wrong_and_ids_of_both_kinds():
    questions = [
        {"question_id": "1", "question_type_id": 1, "data_type": "image", "answer": "A"},
        {"question_id": "v2", "question_type_id": 2, "data_type": "video", "answer": "B"},
        {"question_id": 3, "question_type_id": 1, "data_type": "image", "answer": "C"},
    ]
    annotation = {"question_type": {"Scene": 1, "Action": 2}, "questions": questions}
    answers = [{"question_id": 1, "text": "A"}, {"question_id": "v2", "text": "B"}]
    units = eval_seed.units(annotation, answers)
    scores = {name: part.percent for name, part in units.by_group().items()}
    assert scores["Scene"] == 50 and scores["Action"] == 100 and scores["video accuracy"] == 100
    assert units.percent == pytest.approx(200 / 3)
