"""Answers and right answers meet by key, in any order; whatever does not fit is named [B5]."""

import json

import pytest

from llava.eval.benchmarks import find_benchmark, gpt_review
from llava.eval.benchmarks import gqa as eval_gqa
from llava.eval.benchmarks import mmbench as eval_mmbench
from llava.eval.benchmarks import mmvet as eval_mmvet
from llava.eval.benchmarks import qbench as eval_qbench
from llava.eval.benchmarks import refcoco as eval_refcoco
from llava.eval.benchmarks import review_summary as summarize_gpt_review
from llava.eval.benchmarks import seed as eval_seed
from llava.eval.benchmarks import sqa as eval_science_qa
from llava.eval.benchmarks import textvqa as eval_textvqa
from llava.eval.benchmarks import vizwiz as eval_vizwiz
from llava.eval.benchmarks import vqav2 as eval_vqav2
from llava.eval.files.answer_lines import read_answers_tolerantly
from llava.eval.files.matching import check_asked, check_known
from llava.eval.files.records import read_jsonl
from tests.eval import mini_benchmark
from tests.eval.eval_files import SHORT, run_scorer, write_lines

YES = ["yes"] * 10


def one_answer(key, text, **fields):
    return {"question_id": key, "prompt": f"Q{key}?{SHORT}", "text": text, **fields}


def textvqa(answers):
    data = [{"image_id": key, "question": f"Q{key}?", "answers": YES} for key in ("1", "2")]
    return eval_textvqa.units(data, answers)


def gqa(answers):
    question = {
        "question": "?", "answer": "yes", "isBalanced": True, "groups": {"global": None},
        "types": {"structural": "verify", "semantic": "obj"}, "semantic": [],
    }  # fmt: skip
    check_known(answers, (1, 2), "the questions of GQA")
    return eval_gqa.units({"1": question, "2": question}, eval_gqa.predictions_of(answers))


def vizwiz(answers):
    questions = [{"question_id": key, "image": f"{key}.jpg"} for key in (1, 2)]
    return eval_vizwiz.units({"1.jpg": YES, "2.jpg": YES}, questions, answers)


def refcoco(answers):
    box = {"bbox": [0, 0, 10, 10], "width": 10, "height": 10}
    answers = [a | {"text": "[0, 0, 1, 1]" if "y" in a["text"] else "no"} for a in answers]
    return eval_refcoco.units([box | {"question_id": key} for key in (1, 2)], answers)


def seed(answers):
    kinds = {"question_type_id": 1, "data_type": "image", "answer": "yes"}
    annotation = {
        "question_type": {"x": 1},
        "questions": [{"question_id": k} | kinds for k in "12"],
    }
    return eval_seed.units(annotation, answers)


def science_qa(answers):
    problems = {key: {"choices": ["p", "q"], "answer": 0} for key in "12"}
    answers = [a | {"text": "A\n" if "y" in a["text"] else "B"} for a in answers]
    asked = [answer["question_id"] for answer in answers]
    return eval_science_qa.units(problems, asked, answers)


def vqav2(answers):
    return eval_vqav2.units({1: YES, "2": YES}, answers)


SCORERS = (textvqa, gqa, vizwiz, refcoco, seed, science_qa, vqav2)


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: scorer.__name__)
def test_b5_ids_may_be_numbers_or_texts_and_every_answer_counts_once(scorer):
    right, wrong = one_answer(1, "yes\n"), one_answer(2, "no")
    for answers in (
        [right, wrong],
        [wrong, right],
        [right, wrong, right],
        [right | {"question_id": "1"}, wrong | {"question_id": "2"}],
        [right | {"question_id": "1"}, wrong | {"question_id": 2}, right],
    ):
        result = scorer(answers)
        assert (result.percent, result.count) == (50, 2)


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: scorer.__name__)
def test_an_answer_to_no_question_and_two_different_ones_to_one_are_named(scorer, tmp_path):
    first = one_answer(1, "yes")
    for second, message in (
        (one_answer(7, "yes"), "7"),
        (first | {"text": "no"}, "question 1 has two answers"),
    ):
        answers = read_jsonl(write_lines(tmp_path / "a.jsonl", [first, second]))
        if scorer is refcoco or scorer is science_qa:  # these read other answers than "yes"
            answers = list(answers)
        with pytest.raises(ValueError, match=message) as raised:
            scorer(answers)
        assert "a.jsonl" in str(raised.value) or not hasattr(answers, "path")


def test_b5_vqav2_uploads_are_not_empty_when_ids_are_of_two_kinds(tmp_path):
    questions = [{"question_id": key} for key in (1, 2)]
    path = write_lines(tmp_path / "a.jsonl", [one_answer("1", "Yes"), one_answer("1", "Yes")])
    texts, _ = read_answers_tolerantly(path)
    lines = eval_vqav2.upload(questions, texts)
    assert lines == [{"question_id": 1, "answer": "yes"}, {"question_id": 2, "answer": ""}]
    with pytest.raises(ValueError, match="1 answers belong to no question of .*question 3"):
        eval_vqav2.upload(questions, {"1": "yes", "3": "no"})
    write_lines(tmp_path / "a.jsonl", [one_answer(1, "Yes"), one_answer("1", "No")])
    with pytest.raises(ValueError, match="a.jsonl: question '?1'? has two answers"):
        read_answers_tolerantly(path)


def test_other_uploads_match_ids_of_two_kinds_too():
    images = [{"question_id": 1, "image": "a.jpg"}]
    assert eval_vizwiz.upload(images, {"1": "Yes"}) == [{"image": "a.jpg", "answer": "yes"}]
    assert eval_seed.upload([{"question_id": "1"}], {1: "A"})[0]["prediction"] == "A"
    answers = [one_answer("v1_0", "x"), one_answer(0, "x"), one_answer(1, "y")]
    assert eval_mmvet.upload(answers) == {"v1_0": "x", "v1_1": "y"}
    assert [line["questionId"] for line in eval_gqa.predictions_of(answers[1:] * 2)] == [0, 1]


def test_textvqa_counts_a_question_as_often_as_it_is_annotated():
    data = [{"image_id": "i", "question": "Q1?", "answers": YES}] * 2
    answer = one_answer(1, "yes") | {"question_id": "i"}
    assert eval_textvqa.units(data, [answer] * 2).count == 2
    assert eval_textvqa.units(data, [answer] * 4).count == 2
    assert eval_textvqa.units(data, [answer]).count == 1


def test_qbench_answers_meet_their_questions_by_image_and_text(tmp_path, monkeypatch, capsys):
    records = [
        {"question": "?", "img_path": f"{n}.jpg", "candidates": ["Yes", "No"], "correct_ans": right}
        for n, right in enumerate(("Yes", "No"))
    ]
    answers = [record | {"text": text} for record, text in zip(records, "AB", strict=True)]
    assert eval_qbench.units(records, answers[::-1]).percent == 100
    assert eval_qbench.units(records, [answers[1]] * 2) == eval_qbench.units(records, answers[1:])
    questions = tmp_path / "q.json"
    questions.write_text(json.dumps(records))
    path = write_lines(tmp_path / "a.jsonl", answers[1:])
    run_scorer(monkeypatch, eval_qbench, "--question-file", questions, "--result-file", path)
    assert "1 of 2 questions have no answer, such as '?' about 0.jpg" in capsys.readouterr().err
    with pytest.raises(ValueError, match="question '?.?'? about 5.jpg is not in"):
        eval_qbench.units(records, [answers[0] | {"img_path": "5.jpg"}])


def test_programs_say_how_many_questions_have_no_answer(tmp_path, monkeypatch, capsys):
    data = mini_benchmark.build(tmp_path / "data")
    answer = one_answer(1, "yes", options=["red", "blue"], option_char="AB")
    path = write_lines(tmp_path / "a.jsonl", [answer])
    for scorer, truth in (
        (eval_vqav2, "vqav2/v2_mscoco_val2014_annotations.json"),
        (eval_refcoco, "refcoco/refcoco_val.jsonl"),
        (eval_mmbench, "mmbench/mmbench_dev_20230712.tsv"),
    ):
        run_scorer(monkeypatch, scorer, "--annotation-file", data / truth, "--result-file", path)
        err = capsys.readouterr().err
        assert f"note: {path}: 1 of 2 questions have no answer, such as " in err, scorer


@pytest.mark.parametrize("name", ["pope", "gqa", "vqav2", "mmbench", "refcoco", "sqa", "mme"])
def test_a_complete_set_is_one_in_any_order_and_what_it_lacks_is_named(name, tmp_path):
    data, benchmark = mini_benchmark.build(tmp_path / "data"), find_benchmark(name)
    questions = str(data / benchmark.questions)
    lines = [q.answer_line("A", "id", "m") for q in benchmark.select(benchmark.read(questions))]
    answers = read_jsonl(write_lines(tmp_path / "a.jsonl", lines))
    whole = benchmark.score(str(data), benchmark.read(questions), answers, None)
    backwards = [a | {"question_id": str(a["question_id"])} for a in answers[::-1]]
    again = benchmark.score(str(data), benchmark.read(questions), backwards, None)
    assert again.result()["score"] == whole.result()["score"] and again.count == whole.count
    path = write_lines(tmp_path / "b.jsonl", [lines[0], lines[1] | {"question_id": "other"}])
    message = "b.jsonl: .*no answer to question .* and an answer to question 'other'"
    with pytest.raises(ValueError, match=message):
        benchmark.score(str(data), benchmark.read(questions), read_jsonl(path), None)


@pytest.mark.parametrize(
    "reply", ["10 9", "10,9", "10, 9", "10, 9\nThe first is better.", " 10  9 "]
)
def test_two_scores_may_have_a_comma_and_a_space_between_them(reply):
    assert gpt_review.parse_scores(reply) == [10, 9]


@pytest.mark.parametrize("reply", ["nan 8", "8 inf", "8", "8 good"])
def test_what_holds_no_two_numbers_is_no_review(reply):
    with pytest.raises(ValueError):
        gpt_review.parse_scores(reply)


def test_a_review_that_stands_there_twice_counts_once():
    reviews = [{"question_id": n, "category": "c", "tuple": [8, 4 * n]} for n in (1, 2)]
    once = summarize_gpt_review.summarize(reviews)
    assert summarize_gpt_review.summarize([*reviews, reviews[0]]) == once


def test_mmvet_grades_every_question_once(tmp_path):
    asked = []

    class Judge:
        model, settings = "m", {"judge": "m"}

        def ask_all(self, prompts):
            asked.extend(prompts)
            return ["1.0" for _ in prompts]

    entry = {"question": "?", "answer": "x", "capability": ["ocr"]}
    entries = {"v1_0": entry, "v1_1": entry}
    answers = [one_answer("v1_0", "x"), one_answer(0, "x"), one_answer(1, "y")]
    units = eval_mmvet.units(Judge(), entries, answers, str(tmp_path / "g.jsonl"))
    assert units.count == len(asked) == 2
    with pytest.raises(ValueError, match="mm-vet.json has no 'v1_7'"):
        eval_mmvet.units(Judge(), entries, [one_answer(7, "x")], str(tmp_path / "h.jsonl"))


@pytest.mark.parametrize(
    "answered, says",
    [([1], "no answer to question 2$"), ([1, 2, 3], "an answer to question 3, which is not asked")],
)
def test_a_missing_answer_is_enough_and_so_is_one_too_many(answered, says):
    heads = [{"question_id": 1}, {"question_id": 2}]
    check_asked(heads, [{"question_id": key} for key in (2, 1)], "questions.jsonl")
    with pytest.raises(ValueError, match=says):
        check_asked(heads, [{"question_id": key} for key in answered], "questions.jsonl")
