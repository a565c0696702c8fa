"""The README and the docs: their commands run, their tables and paths are true."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from llava.eval.compare import gallery
from llava.eval.compare.comparison import AVERAGE
from llava.pruning import METHODS
from tests.paths import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def commands(text: str) -> list[str]:
    """The commands of all shell blocks, continuation lines joined, comments cut off."""
    joined = "\n".join(blocks(text, "bash")).replace("\\\n", " ")
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def run(command: str, **env) -> str:
    done = subprocess.run(
        ["bash", "-c", command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_table_of_methods_is_the_table_in_the_code():
    rows = re.findall(r"^\| `(\w+)` \|.*\| `(llava/\S+)` \|$", README, re.M)
    assert sorted(name for name, _ in rows) == sorted(METHODS.own)
    for name, path in rows:
        assert METHODS[name].__module__.replace(".", "/") + ".py" == path


def test_every_path_the_pages_name_exists():
    # Left out: what a run writes, data of the reader's own, and names with a part to fill in.
    made = (
        *("playground/data/", "llava/pruning/largest", "llava/pruning/last_attention"),
        "llava/eval/benchmarks/countbench",
    )
    pattern = r"(?<![\w/])(?:llava|scripts|docs|playground|tests)/[\w./{},+-]*[\w/](?![\w<*])"
    for page in PAGES:
        for path in re.findall(pattern, page.read_text()):
            blank = re.search(r"[{}]|TOKENS|BENCHMARK|METHOD|NAME|CARD|_$", path)
            if not blank and not path.startswith(made):
                assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_no_page_names_a_folder_of_the_machine_it_was_written_on():
    for page in PAGES:
        assert not re.findall(r"(?<![\w.])/(?:home|root|work|Users)/[\w./-]+", page.read_text())


def test_the_file_tree_names_what_is_there():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    tree = re.search(r"^llava/\n.*?^docs/", page, re.S | re.M)[0]
    listed = re.findall(r"^  (\S+)  ", tree, re.M)
    there = {p.name + "/" * p.is_dir() for p in (ROOT / "llava").iterdir()}
    there -= {"__init__.py", "__pycache__/"}
    assert set(listed) == there


def test_the_python_example_answers(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = blocks(README, "python")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "red"


def test_the_example_of_the_other_family_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = blocks((ROOT / "docs" / "Qwen2.5-VL.md").read_text(), "python")
    code = code.replace("Qwen/Qwen2.5-VL-3B-Instruct", "tests/golden/tiny-qwen2.5-vl-cut")
    names = {}
    exec(compile(code, "Qwen2.5-VL.md", "exec"), names)
    assert type(names["model"]).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert names["picture"].pixels.shape == (12, 12, 4, 1176)
    assert capsys.readouterr().out.startswith("[")


def test_every_module_the_pages_run_exists():
    for page in PAGES:
        for module in re.findall(r"python -m (llava[\w.]*|playground[\w.]*)", page.read_text()):
            if module.endswith(".NAME"):  # the reader fills it in
                continue
            path = ROOT / module.replace(".", "/")
            main = path / "__main__.py"
            assert path.with_suffix(".py").exists() or main.exists(), f"{page.name}: {module}"


def test_the_readme_names_every_extra():
    (named,) = re.findall(r"# extras: (.+)$", README, re.M)
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    table = re.search(r"^EXTRAS = \{\n(.*?)^\}", text, re.S | re.M)[1]
    keys = re.findall(r'^    "(\w+)": ', table, re.M) + re.findall(
        r'^EXTRAS\["(\w+)"\]', text, re.M
    )
    assert sorted(named.split(", ")) == sorted(keys)


def test_the_readme_starts_the_demo():
    assert "python -m llava.serve.demo" in commands(README)


def test_the_readme_s_scores_on_all_questions_are_those_of_the_results():
    (own,) = [
        c for c in gallery.read(ROOT / gallery.RESULTS) if "llava" in c.settings["model_name"]
    ]
    scores = {(row.method, row.budget.tokens): row.cells[AVERAGE] for row in own.rows}
    few, random = (f"{scores[name, 64].percent:.1f}" for name in ("vispruner", "random"))
    assert f"{few} and {random} of {own.dense.cells[AVERAGE].percent:.1f}" in README
    assert f"all {own.dense.cells[AVERAGE].count:,} questions" in README


@pytest.mark.slow
def test_the_evaluation_command_prints_a_score():
    (command,) = [c for c in commands(README) if "scripts/v1_5/eval/textvqa.sh" in c]
    assert "score" in run(command, LIMIT="8")


@pytest.mark.slow
def test_the_single_image_command_answers(tmp_path):
    (command,) = [c for c in commands(README) if "run_llava" in c and "photo.jpg" in c]
    command = re.sub(r"--(model-path|conv-mode|image-file) \S+", "", command)
    answer = run(f"{command} --temperature 0")
    assert "ladder" in answer and "star" in answer


@pytest.mark.slow
def test_quickstart_ends_with_a_table_and_two_pictures(tmp_path):
    out = run("bash scripts/quickstart.sh", LIMIT="6", OUT=str(tmp_path))
    assert "| 64" in out or "64 |" in out
    for name in ("table.md", "plot.png", "kept_patches.png"):
        assert (tmp_path / name).stat().st_size > 0
