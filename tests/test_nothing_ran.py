"""A program that had nothing to do does not end as if all were well."""

import os
import subprocess
import sys

import pytest

from llava.eval import model_vqa_loader, score_table
from llava.eval.benchmarks import textvqa
from llava.eval.efficiency import program as efficiency
from tests.paths import GOLDEN, ROOT


@pytest.mark.parametrize(
    "program, words, said",
    [
        (score_table, [], "no score to show"),
        (textvqa, ["--annotation-file", "a.json"], "nothing to score: name a --result-file"),
    ],
)
def test_without_files_there_is_no_table(program, words, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", *words])
    with pytest.raises(SystemExit, match=said):
        program.main()


def test_a_measurement_of_no_method_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(efficiency, "methods_to_measure", lambda *_: ({}, {"fastv": "too deep"}))
    with pytest.raises(SystemExit, match="no method can be measured"):
        efficiency.main(["--config", str(GOLDEN / "tiny-llava-v1.5"), "--count-kernels"])
    assert "not measured: fastv: too deep" in capsys.readouterr().out


def test_a_question_file_without_questions_is_an_error(tmp_path, monkeypatch):
    questions = tmp_path / "questions.jsonl"
    questions.touch()
    words = ["--question-file", str(questions), "--model-path", str(GOLDEN / "tiny-llava-v1.5")]
    answers = tmp_path / "answers.jsonl"
    monkeypatch.setattr(sys, "argv", ["program", *words, "--answers-file", str(answers)])
    with pytest.raises(SystemExit, match=f"{questions} holds no question"):
        model_vqa_loader.main()
    assert not answers.exists()


def test_a_folder_without_data_runs_no_benchmark(tmp_path):
    done = subprocess.run(
        ["bash", "scripts/v1_5/eval/all.sh"],
        cwd=ROOT,
        env={**os.environ, "DATA_DIR": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == f"error: there is no data of any benchmark in {tmp_path}\n"
