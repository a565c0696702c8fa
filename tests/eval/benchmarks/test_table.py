"""The table of benchmarks is a list of files; shared code knows none of them."""

import importlib
import re
import subprocess
import sys

import pytest

from llava.eval.benchmarks import FILES, all_benchmarks, find_benchmark
from tests.paths import ROOT

FOLDER = ROOT / "llava/eval/benchmarks"


def test_the_table_names_every_file_that_holds_benchmarks():
    there = {p.stem for p in FOLDER.glob("*.py") if "\nBENCHMARKS = " in p.read_text()}
    assert set(FILES) == there
    modules = [importlib.import_module(f"llava.eval.benchmarks.{name}") for name in FILES]
    entries = [entry for module in modules for entry in module.BENCHMARKS]
    assert len({entry.name for entry in entries}) == len(entries) == len(all_benchmarks())


def test_no_benchmark_reads_from_another():
    for name in FILES:
        used = re.findall(
            r"benchmarks\.(\w+) import|benchmarks import (.*)", (FOLDER / f"{name}.py").read_text()
        )
        words = {word for pair in used for part in pair for word in re.findall(r"\w+", part)}
        assert not words & set(FILES), name


@pytest.mark.parametrize(
    "path", ["scripts/eval_common.sh", "llava/eval/score.py", "llava/eval/benchmarks/data_files.py"]
)
def test_shared_code_names_no_benchmark(path):
    text = (ROOT / path).read_text()
    code = re.sub(r'^#.*$|\s#.*$|"""[\s\S]*?"""', "", text, flags=re.M)
    assert not set(re.findall(r"\w+", code)) & {*FILES, *all_benchmarks()}


def test_the_table_is_read_without_torch():
    """Scripts ask it before every program; torch alone takes seconds."""
    code = (
        "import sys, llava.eval.score, llava.eval.benchmarks as table; table.all_benchmarks(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", ["gqa", "viscot"])
def test_a_file_starts_as_a_program_without_a_warning(name):
    command = [sys.executable, "-W", "error", "-m", f"llava.eval.benchmarks.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and not done.stderr and "--help" in done.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gqa_foo", "unknown split 'foo' of gqa, which has one only: name none"),
        ("vizwiz_foo", "unknown split 'foo' of vizwiz, choose from val, or name none"),
    ],
)
def test_a_split_that_there_is_not_is_named_with_those_of_its_benchmark(name, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        find_benchmark(name)
