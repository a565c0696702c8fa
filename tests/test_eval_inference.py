"""The answering programs write what the reference programs wrote."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
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
