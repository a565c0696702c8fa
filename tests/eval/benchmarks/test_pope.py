"""POPE: labels belong to questions by image and text [B1]."""

import pytest

from llava.eval.benchmarks import find_benchmark
from llava.eval.benchmarks import pope as eval_pope
from llava.eval.files.records import read_jsonl
from tests.eval.eval_files import SHORT, run_scorer, write_lines

THINGS = {"a.jpg": "dog", "b.jpg": "cat"}


def pope_question(number, image, thing, category="random"):
    text = f"Is there a {thing} in the image?{SHORT}"
    return {"question_id": number, "image": image, "text": text, "category": category}


def pope_label(number, image, thing):
    label = "yes" if THINGS[image] == thing else "no"
    text = f"Is there a {thing} in the image?"
    return {"question_id": number, "image": image, "text": text, "label": label}


ASKED = [("a.jpg", "dog"), ("a.jpg", "cat"), ("b.jpg", "cat")]


def score(folder, questions, answers):
    benchmark = find_benchmark("pope")
    return benchmark.score(str(folder), benchmark.read(str(questions)), answers)


@pytest.fixture
def pope(tmp_path):
    """Three questions about two images; labels of the same and one more, shuffled."""
    write_lines(
        tmp_path / "pope/llava_pope_test.jsonl",
        [pope_question(10 + n, *pair) for n, pair in enumerate(ASKED)],
    )
    labels = [pope_label(n, *pair) for n, pair in enumerate([("b.jpg", "dog"), *ASKED[::-1]])]
    write_lines(tmp_path / "pope/coco/coco_pope_random.json", labels)
    right = [
        {"question_id": 10 + n, "prompt": pope_question(0, *pair)["text"], "text": text}
        for n, (pair, text) in enumerate(zip(ASKED, ("Yes", "No", "Yes"), strict=True))
    ]
    write_lines(tmp_path / "a.jsonl", right)
    return tmp_path


def test_b1_pope_labels_in_another_order_give_a_perfect_model_100(pope, monkeypatch, capsys):
    answers = read_jsonl(str(pope / "a.jsonl"))
    questions = str(pope / "pope/llava_pope_test.jsonl")
    for order in (answers, answers[::-1], answers * 2):
        units = score(pope, questions, order)
        assert units.percent == 100 and units.count == 3
    options = ("--annotation-dir", pope / "pope/coco", "--question-file", questions)
    run_scorer(monkeypatch, eval_pope, *options, "--result-file", pope / "a.jsonl")
    assert "F1 score: 1.0" in capsys.readouterr().out


def test_b1_pope_stops_when_the_labels_are_those_of_another_set(pope):
    write_lines(pope / "pope/coco/coco_pope_random.json", [pope_label(1, "a.jpg", "dog")] * 3)
    answers, questions = read_jsonl(str(pope / "a.jsonl")), pope / "pope/llava_pope_test.jsonl"
    for use in (
        lambda: score(pope, questions, answers),
        lambda: eval_pope.units(str(pope / "pope/coco"), read_jsonl(str(questions)), answers),
    ):
        message = "coco_pope_random.json belongs to other questions: .* 2 of the 3 .*question 11"
        with pytest.raises(ValueError, match=message):
            use()


def test_pope_refuses_labels_that_are_neither_yes_nor_no_or_contradict_each_other(tmp_path):
    first = pope_label(1, "a.jpg", "dog")
    path = write_lines(tmp_path / "coco_pope_random.json", [first, first | {"label": "perhaps"}])
    with pytest.raises(ValueError, match="label 2: 'perhaps' is neither yes nor no"):
        eval_pope.read_labels(path)
    write_lines(tmp_path / "coco_pope_random.json", [first, first | {"label": "No\n"}])
    with pytest.raises(ValueError, match="label 2: the same question is labelled yes and no"):
        eval_pope.read_labels(path)
    write_lines(tmp_path / "coco_pope_random.json", [{"question_id": 1, "label": "yes"}])
    with pytest.raises(ValueError, match="line 1: no field 'image', 'text'"):
        eval_pope.read_labels(path)


def test_pope_does_not_score_a_category_without_labels_in_silence(pope, monkeypatch, capsys):
    questions = pope / "pope/llava_pope_test.jsonl"
    extra = pope_question(20, "b.jpg", "dog", "popular")
    write_lines(questions, [*read_jsonl(str(questions)), extra])
    answer = {"question_id": 20, "prompt": extra["text"], "text": "No"}
    answers = [*read_jsonl(str(pope / "a.jsonl")), answer]
    write_lines(pope / "a.jsonl", answers)
    with pytest.raises(ValueError, match="pope/coco has no labels of popular"):
        score(pope, questions, answers)
    options = ("--annotation-dir", pope / "pope/coco", "--question-file", questions)
    run_scorer(monkeypatch, eval_pope, *options, "--result-file", pope / "a.jsonl")
    assert "has no labels of popular" in capsys.readouterr().err


def test_pope_questions_that_share_an_id_are_refused(pope):
    questions = [pope_question(1, "a.jpg", "dog"), pope_question(1, "b.jpg", "cat")]
    with pytest.raises(ValueError, match="there are two questions 1"):
        eval_pope.units(str(pope / "pope/coco"), questions, [{"question_id": 1, "text": "Yes"}])


@pytest.mark.parametrize("text", ["No\n", "no\t", "No.\r\n", "no,", " No"])
def test_white_space_around_an_answer_of_pope_does_not_matter(text):
    assert not eval_pope.is_yes(text)
