"""Every benchmark that is scored here has intervals, over units that add up to its score."""

import os

import pytest

from llava.eval.benchmarks import BENCHMARKS
from llava.eval.data_files import PLAYGROUND_DIRS
from llava.eval.resampling import UNITS, interval
from tests.eval_cases import ROOT

SAID = ("A", "Yes", "B", "[0.1, 0.2, 0.6, 0.7]", "No", "red", "C")


def data_of(benchmark):
    folders = [ROOT / name for name in PLAYGROUND_DIRS]
    return next(str(f) for f in folders if (f / benchmark.questions).exists())


def test_every_benchmark_that_is_scored_here_has_units():
    assert UNITS.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize("name", sorted(UNITS))
def test_units_add_up_to_the_score_on_the_playground(name):
    benchmark = BENCHMARKS[name]
    folder = data_of(benchmark)
    path = os.path.join(folder, benchmark.questions)
    answers = [
        question.answer_line(SAID[number % len(SAID)], str(number), "m")
        for number, question in enumerate(benchmark.load_questions(path))
    ]
    expected = benchmark.score(folder, path, answers, None)["percent"]
    units = UNITS[name](folder, path, answers)
    assert units.percent == pytest.approx(expected)
    low, high = interval(units.draws(seed=0, count=200))
    assert low - 1e-9 <= expected <= high + 1e-9
