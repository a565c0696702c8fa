"""The unpruned scores that scripts and pages promise are those of docs/published_numbers.csv."""

import re

import pytest

from llava.eval.compare.expected import MODELS, SCRIPTS, expected, report
from llava.eval.compare.published import read_published
from tests.paths import ROOT

ROWS = read_published()


def script_line(benchmark):
    """What a script says of its benchmark in its head: "LLaVA-1.5-7B 85.9; LLaVA-NeXT-7B 86.8"."""
    said = ((name, expected(benchmark, model, ROWS)) for name, model in MODELS.items())
    return "; ".join(f"{name} {scores}" for name, scores in said if scores)


@pytest.mark.parametrize("benchmark", SCRIPTS)
def test_the_head_of_a_script_says_what_to_expect(benchmark):
    script = SCRIPTS[benchmark][0].split()[-1]
    head = (ROOT / "scripts/v1_5/eval" / script).read_text().split("\nsource ")[0]
    assert f"as published: {script_line(benchmark)}.\n" in head


def test_no_script_promises_anything_else():
    promised = []
    for script in sorted((ROOT / "scripts").glob("*/eval/*.sh")):
        promised += re.findall(r"as published: (.*)\.$", script.read_text(), re.M)
    assert sorted(promised) == sorted(map(script_line, SCRIPTS))


def test_numbers_are_those_of_our_metric():
    assert expected("pope", "llava-1.5-7b", ROWS) == "85.9"
    assert expected("mme", "llava-1.5-7b", ROWS) == "1506, 1513"  # not the total
    assert expected("gqa", "llava-next-7b", ROWS) == "62.5, 64.2"
    assert expected("mme", "llava-1.5-13b", ROWS) == "1531"
    assert expected("sqa", "llava-1.5-13b", ROWS) == "71.6, 72.8"
    assert expected("textvqa", "llava-next-13b", ROWS) == ""  # as printed: of other prompts
    assert expected("pope", "qwen2.5-vl-7b", ROWS) == ""  # as printed: whose metric is not said


def test_a_benchmark_has_a_row_with_its_scores():
    lines = report().splitlines()
    assert lines[0] == f"| script | questions | metric | {' | '.join(MODELS)} |"
    assert "| `pope.sh` | 8,910 | F1 | 85.9 | 86.5, 86.8 | 85.9 | 86.2 |" in lines
    assert len(lines) == 2 + len(SCRIPTS)
