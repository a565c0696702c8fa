"""The answering programs write what the reference programs wrote."""

import json

import pytest

from llava.eval.answering.answers_file import read_journals
from llava.eval.answering.loop import AnswerLoop
from tests.eval import eval_cases
from tests.golden_checks.inference import with_released_template
from tests.paths import GOLDEN

RECORDED = json.loads((GOLDEN / "llava-base" / "inference_cli.json").read_text())
CASES = [case for case in RECORDED if case["module"] != "llava.eval.run_llava"]


def locate(name):
    """A checkpoint or image of the shipped reference data."""
    return next(path for path in (GOLDEN / name, GOLDEN / "images" / name) if path.exists())


def prepare(case, folder):
    return eval_cases.inference_argv(case, folder, locate)


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["id"])
def test_answers_and_key_order_equal_the_recorded_ones(case, tmp_path):
    run = with_released_template(case)
    assert not eval_cases.inference_differences(run, tmp_path, locate)


BATCHED = ["loader-v1.5", "science-0", pytest.param("loader-v1.6", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_gives_the_same_answers_as_one_by_one(name, tmp_path):
    case = next(case for case in CASES if case["id"] == name)
    argv = prepare(case, tmp_path)
    eval_cases.run_program(case["module"], [*argv, "--batch-size", "3"])
    texts = [record["text"] for record in eval_cases.read_answers(tmp_path / "a.jsonl")]
    assert texts == [record["text"] for record in case["answers"]]


@pytest.mark.slow
def test_several_images_per_question_and_unequal_crops_fit_in_one_batch(tmp_path):
    case = next(case for case in CASES if case["id"] == "loader-v1.6")
    both = ["img0_336x336.png", "img3_1200x500.png"]
    questions = [
        {"question_id": 0, "image": both, "text": "Compare."},
        {"question_id": 1, "text": "No image here."},
    ]
    content = "".join(json.dumps(question) + "\n" for question in questions)
    argv = prepare(case | {"inputs": {"q.jsonl": content}}, tmp_path)
    texts = []
    argv += ["--max_new_tokens", "4", "--overwrite"]
    for size in ("1", "2"):
        eval_cases.run_program(case["module"], [*argv, "--batch-size", size])
        texts.append([record["text"] for record in eval_cases.read_answers(tmp_path / "a.jsonl")])
    assert texts[0] == texts[1]


def test_a_stopped_run_is_continued_to_the_same_answers(tmp_path, monkeypatch):
    case = next(case for case in CASES if case["id"] == "loader-v1.5")
    argv = prepare(case, tmp_path)
    generate, calls = AnswerLoop.generate, []

    def stop_at_the_second_batch(loop, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(loop, batch)

    monkeypatch.setattr(AnswerLoop, "generate", stop_at_the_second_batch)
    with pytest.raises(SystemExit, match="130"):
        eval_cases.run_program(case["module"], argv)
    path, journal = tmp_path / "a.jsonl", tmp_path / "a.parts" / "0.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"number": 1, "line": {"que')
    eval_cases.run_program(case["module"], argv)
    texts = [record["text"] for record in eval_cases.read_answers(path)]
    assert texts == [record["text"] for record in case["answers"]]
    assert len(calls) == len(case["answers"]) + 1


@pytest.mark.parametrize("content", [None, b"not an image"], ids=["missing", "corrupt"])
def test_a_bad_image_is_named_and_answers_before_it_are_kept(content, tmp_path):
    case = next(case for case in CASES if case["id"] == "loader-v1.5")
    bad = tmp_path / "bad.webp"
    if content:
        bad.write_bytes(content)
    line = json.dumps({"question_id": "q9", "image": str(bad), "text": "What?"}) + "\n"
    lines = case["inputs"]["q.jsonl"].splitlines(keepends=True)
    inputs = {"q.jsonl": "".join([*lines[:2], line, *lines[2:]])}
    argv = prepare(case | {"inputs": inputs}, tmp_path)
    with pytest.raises(SystemExit) as stop:  # a text as exit code: printed, and the status is 1
        eval_cases.run_program(case["module"], [*argv, "--batch-size", "3"])
    assert "question q9" in stop.value.code and str(bad) in stop.value.code
    assert len(read_journals(str(tmp_path / "a.jsonl"), ("text",))) == 3  # the batch before


@pytest.mark.parametrize("reuse", ["--reuse", "--no-reuse"])
def test_lines_say_how_many_visual_tokens_a_method_kept(tmp_path, reuse):
    case = next(case for case in CASES if case["id"] == "loader-v1.5")
    options = ["--batch-size", "2", "--pruning-method", "random", "--visual-token-num", "30"]
    eval_cases.run_program(case["module"], [*prepare(case, tmp_path), *options, reuse])
    for record in eval_cases.read_answers(tmp_path / "a.jsonl"):
        kept = {"visual_tokens": 30.0, "visual_tokens_at_end": 30, "visual_tokens_unpruned": 576}
        assert record["metadata"] == kept


def test_lines_tell_the_average_over_layers_from_what_is_left_at_the_end(tmp_path):
    case = next(case for case in CASES if case["id"] == "loader-v1.5")
    options = ["--pruning-method", "fastv", "--visual-token-num", "100", "--limit", "2"]
    eval_cases.run_program(case["module"], [*prepare(case, tmp_path), *options])
    for record in eval_cases.read_answers(tmp_path / "a.jsonl"):
        metadata = record["metadata"]
        assert 0 < metadata["visual_tokens_at_end"] < metadata["visual_tokens"] < 576
