"""docs/Evaluation.md "Adding a benchmark", done on a copy of the package."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.eval import fake_answers
from tests.eval.eval_files import write_lines
from tests.paths import ROOT
from tests.repeated import others_slow

PAGE = (ROOT / "docs/Evaluation.md").read_text().split("## Adding a benchmark")[1]
NAME = "countbench"
COUNTS = {"1": 2, "2": 3, "3": 3}
BUILT = shutil.ignore_patterns("__pycache__", ".venv")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package with the file and the word of the page."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("llava", "scripts"):
        shutil.copytree(ROOT / folder, root / folder, ignore=BUILT)
    for name in ("tests/eval/fake_answers.py", "docs/published_numbers.csv"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    name, code = re.search(
        r"^`(llava/\S+\.py)`:\n\n```python\n(.*?)^```", PAGE, re.S | re.M
    ).groups()
    assert not (root / name).exists() and len(code.splitlines()) < 45
    (root / name).write_text(code)
    before, word = re.search(r"^```diff\n (.*)\n\+(.*)\n```", PAGE, re.M).groups()
    table = root / "llava/eval/benchmarks/__init__.py"
    assert table.read_text().count(before + "\n") == 1, "the page shows another table"
    table.write_text(table.read_text().replace(before + "\n", f"{before}\n{word}\n"))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three questions about two pictures, two of them answered right."""
    folder = tmp_path_factory.mktemp("data")
    questions = [
        {"question_id": key, "image": f"{count}.png", "text": "How many?"}
        for key, count in COUNTS.items()
    ]
    truth = [{"question_id": key, "count": count} for key, count in COUNTS.items()]
    write_lines(folder / NAME / "llava_countbench.jsonl", questions)
    write_lines(folder / NAME / "counts.jsonl", truth)
    (folder / NAME / "images").mkdir()
    for question in questions:  # looked for before the first answer
        (folder / NAME / "images" / question["image"]).touch()
    return folder


def run(copy, *command, **environment):
    return subprocess.run(
        list(map(str, command)),
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        encoding="utf-8",
    )


def in_python(copy, code, *argv):
    done = run(copy, sys.executable, "-c", code, *argv)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_questions_answers_score_report_and_interval_follow_from_the_file(copy, data, tmp_path):
    code = """
import json, sys
from llava.eval.benchmarks import find_benchmark
benchmark, texts = find_benchmark("countbench"), ("2", "3.", "two")
questions = benchmark.select(benchmark.read(sys.argv[1]))
for question, text in zip(questions, texts, strict=True):
    print(json.dumps(question.answer_line(text, "id", "m")))
"""
    lines = in_python(copy, code, data / NAME / "llava_countbench.jsonl")
    (tmp_path / "a.jsonl").write_text(lines)
    options = ("--data-dir", data, "--answers-file", tmp_path / "a.jsonl")
    done = run(copy, sys.executable, "-m", "llava.eval.score", NAME, *options)
    assert done.returncode == 0, done.stderr
    report = re.findall(r"^    (.*)$", PAGE.split("scores, and prints")[1], re.M)
    assert report[0] == "Samples: 3" and done.stdout.startswith("\n".join(report) + "\n")
    assert "95 % interval: 50.00 to 100.00 % (2 images drawn anew)" in done.stdout
    result = json.loads((tmp_path / "a.score.json").read_text())
    assert result["groups"] == {"2 things": [100.0, 1], "3 things": [50.0, 2]}


def test_data_are_found_or_named_with_their_source(copy, data, tmp_path):
    program = (sys.executable, "-m", "llava.eval.benchmarks.data_files")
    assert run(copy, *program, "list", "--data-dir", data).stdout == f"{NAME}\n"
    lost = run(copy, *program, NAME, "--data-dir", tmp_path)
    assert lost.returncode == 1 and lost.stderr.count("from https://example.org/countbench") == 3


def test_suite_and_comparison_list_it(copy, data):
    code = """
import sys
from llava.eval.compare.suite import available
print(*(benchmark.name for benchmark in available(None, sys.argv[1])))
"""
    assert in_python(copy, code, data) == f"{NAME}\n"


@pytest.mark.parametrize("script, rest", others_slow([("benchmark.sh", [NAME]), ("all.sh", [])]))
def test_scripts_run_it_without_one_of_its_own(copy, data, tmp_path, script, rest):
    python = fake_answers.interpreter(tmp_path)
    done = run(
        copy,
        *("bash", f"scripts/v1_5/eval/{script}", *rest, "64"),
        DATA_DIR=str(data),
        PYTHON=str(python),
    )
    assert done.returncode == 0, done.stderr
    assert "Samples: 3\nAccuracy: 0.00%\n" in done.stdout
    answers = data / NAME / "answers/llava_countbench/llava-v1.5-playground/vispruner/n_64.jsonl"
    assert len(answers.read_text().splitlines()) == 3
