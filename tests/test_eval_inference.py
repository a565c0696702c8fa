"""The answering programs write what the reference programs wrote."""

import base64
import json
import sys
from pathlib import Path

import pytest

from llava.eval.answer_loop import AnswerLoop

GOLDEN = Path(__file__).parent / "golden"
CAP = 12  # new tokens, as in the recordings
CASES = [
    case
    for case in json.loads((GOLDEN / "llava-base" / "inference_cli.json").read_text())
    if case["module"] != "llava.eval.run_llava"
]


def answer(monkeypatch, module, argv):
    """Runs a program inside this process, in fp32 on the CPU."""
    monkeypatch.setattr(sys, "argv", [module, *argv])
    main = __import__(module, fromlist=["main"]).main
    main()


def prepare(case, folder):
    """Writes the inputs of a recorded case; returns its command line."""
    for name, content in case["inputs"].items():
        for image in (GOLDEN / "images").iterdir():
            mark = f"<base64 of {image.name}>"
            content = content.replace(mark, base64.b64encode(image.read_bytes()).decode())
        (folder / name).write_text(content, encoding="utf-8")
    places = {"@CK": GOLDEN / case["checkpoint"], "@D": folder, "@IMG": GOLDEN / "images"}
    argv = case["argv"]
    for mark, place in places.items():
        argv = [word.replace(mark, str(place)) for word in argv]
    common = ["--max_new_tokens", str(CAP), "--device", "cpu", "--dtype", "float32"]
    return [*argv, *common]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_answer_id(records):
    return [{key: value for key, value in r.items() if key != "answer_id"} for r in records]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_answers_and_key_order_equal_the_recorded_ones(case, tmp_path, monkeypatch):
    answer(monkeypatch, case["module"], prepare(case, tmp_path))
    written = read(tmp_path / "a.jsonl")
    assert without_answer_id(written) == without_answer_id(case["answers"])
    assert [list(record) for record in written] == [list(record) for record in case["answers"]]


@pytest.mark.parametrize("name", ["loader-v1.5", "loader-v1.6", "science-0", "mmbench-all-rounds"])
def test_a_batch_gives_the_same_answers_as_one_by_one(name, tmp_path, monkeypatch):
    case = next(case for case in CASES if case["id"] == name)
    argv = prepare(case, tmp_path)
    answer(monkeypatch, case["module"], [*argv, "--batch-size", "3"])
    texts = [record["text"] for record in read(tmp_path / "a.jsonl")]
    assert texts == [record["text"] for record in case["answers"]]


def test_several_images_per_question_and_unequal_crops_fit_in_one_batch(tmp_path, monkeypatch):
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
        answer(monkeypatch, case["module"], [*argv, "--batch-size", size])
        texts.append([record["text"] for record in read(tmp_path / "a.jsonl")])
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
    with pytest.raises(KeyboardInterrupt):
        answer(monkeypatch, case["module"], argv)
    path = tmp_path / "a.jsonl"
    path.write_bytes(path.read_bytes() + b'{"question_id": 1, "pro')
    answer(monkeypatch, case["module"], argv)
    assert without_answer_id(read(path)) == without_answer_id(case["answers"])
    assert len(calls) == len(case["answers"]) + 1


@pytest.mark.parametrize("content", [None, b"not an image"], ids=["missing", "corrupt"])
def test_a_bad_image_is_named_and_answers_before_it_are_kept(content, tmp_path, monkeypatch):
    case = next(case for case in CASES if case["id"] == "loader-v1.5")
    bad = tmp_path / "bad.png"
    if content:
        bad.write_bytes(content)
    line = json.dumps({"question_id": "q9", "image": str(bad), "text": "What?"}) + "\n"
    lines = case["inputs"]["q.jsonl"].splitlines(keepends=True)
    inputs = {"q.jsonl": "".join([*lines[:2], line, *lines[2:]])}
    argv = prepare(case | {"inputs": inputs}, tmp_path)
    with pytest.raises(SystemExit) as stop:  # a text as exit code: printed, and the status is 1
        answer(monkeypatch, case["module"], [*argv, "--batch-size", "3"])
    assert "question q9" in stop.value.code and str(bad) in stop.value.code
    assert len(read(tmp_path / "a.jsonl")) == 2
