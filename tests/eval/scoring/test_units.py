"""Intervals draw images with all their questions; every benchmark has units that add up to its
score."""

import os
import random
import tracemalloc

import numpy as np
import pytest

from llava.eval.benchmarks.data_files import PLAYGROUND_DIRS
from llava.eval.benchmarks.resampling import UNITS, interval
from llava.eval.benchmarks.table import BENCHMARKS
from llava.eval.scoring.bootstrap import by_image, is_significant, mean_of, mean_where
from llava.eval.scoring.paired import Draws, range_of_mean
from tests.eval.eval_cases import ROOT

SAID = ("A", "Yes", "B", "[0.1, 0.2, 0.6, 0.7]", "No", "red", "C")


def data_of(benchmark):
    folders = [ROOT / name for name in PLAYGROUND_DIRS]
    return next(str(f) for f in folders if (f / benchmark.questions).exists())


def answers_of(benchmark, path):
    return [
        question.answer_line(SAID[number % len(SAID)], str(number), "m")
        for number, question in enumerate(benchmark.load_questions(path))
    ]


def width(units):
    low, high = interval(units.draws(seed=0))
    return high - low


def test_every_benchmark_that_is_scored_here_has_units():
    assert UNITS.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize("name", sorted(UNITS))
def test_units_add_up_to_the_score_on_the_playground(name):
    benchmark = BENCHMARKS[name]
    folder = data_of(benchmark)
    path = os.path.join(folder, benchmark.questions)
    answers = answers_of(benchmark, path)
    result = benchmark.score(folder, path, answers, None)
    expected = result["percent"]
    units = UNITS[name](folder, path, answers)
    assert units.percent == pytest.approx(expected)
    draws = units.draws(seed=0, count=200)
    low, high = interval(draws)
    assert low - 1e-9 <= expected <= high + 1e-9
    questions = benchmark.load_questions(path)
    if name == "sqa":
        questions = [question for question in questions if question.images]
    assert len(units.images) == len({question.images[0] for question in questions})
    if name not in ("pope", "mme"):  # whose sums are others
        assert units.sums[:, 1].sum() == result["count"]
    random.Random(0).shuffle(answers)
    assert np.array_equal(UNITS[name](folder, path, answers).draws(seed=0, count=200), draws)


def test_questions_that_stand_or_fall_together_count_as_one():
    right = np.random.default_rng(0).integers(0, 2, 300)
    once = mean_of(right, [str(n) for n in range(300)])
    six_times = mean_of(np.repeat(right, 6), [str(n) for n in np.repeat(range(300), 6)])
    assert width(six_times) == pytest.approx(width(once), rel=1e-9)
    unaware = mean_of(np.repeat(right, 6))
    assert width(once) / width(unaware) == pytest.approx(6**0.5, rel=0.1)


def test_pope_draws_images_across_its_categories():
    benchmark = BENCHMARKS["pope"]
    folder = data_of(benchmark)
    path = os.path.join(folder, benchmark.questions)
    units = UNITS["pope"](folder, path, answers_of(benchmark, path))
    assert len(benchmark.load_questions(path)) == 3 * len(units.images) == 720
    # Every image brings all of its questions: a draw has each category as often as another.
    counts = units.sums.reshape(240, 3, 4)[:, :, 3].sum(axis=0)
    assert counts.tolist() == [240, 240, 240]


def test_a_category_that_a_draw_has_nothing_of_does_not_lower_it():
    scores = np.array([[0.5, 0.0], [0.5, 1.0]])
    assert mean_where(scores, np.array([[True, False], [True, True]])).tolist() == [0.5, 0.75]


def test_ratios_of_sums_are_drawn_like_means():
    """F1 = 2 right / (2 right + wrong + missed), against a bootstrap written out."""
    rng = np.random.default_rng(3)
    values = rng.integers(0, 2, (40, 3)).astype(float)
    images = [str(n // 4) for n in range(40)]

    def f1(sums):
        return 100 * 2 * sums[:, 0] / (2 * sums[:, 0] + sums[:, 1] + sums[:, 2])

    units = by_image(values, images, f1)
    by_hand = np.random.default_rng(7)
    groups = [[n for n in range(40) if images[n] == image] for image in units.images]
    expected = []
    for _ in range(50):
        rows = [n for g in by_hand.integers(len(groups), size=len(groups)) for n in groups[g]]
        expected.append(f1(values[rows].sum(axis=0, keepdims=True))[0])
    assert units.draws(seed=7, count=50) == pytest.approx(expected)


def test_draws_need_no_table_of_all_questions():
    points = np.random.default_rng(0).integers(0, 2, 100_000)
    units = mean_of(points, [str(n // 3) for n in range(100_000)])
    tracemalloc.start()
    try:
        units.draws(seed=0, count=100)
        assert tracemalloc.get_traced_memory()[1] < 50e6  # (100, 33334) numbers twice are 53 MB
    finally:
        tracemalloc.stop()


def test_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    units = mean_of(np.arange(100) % 3 == 0)
    together = units.draws(seed=1, count=30)
    monkeypatch.setattr("llava.eval.scoring.bootstrap.CHUNK", 700)
    assert np.array_equal(units.draws(seed=1, count=30), together)


def test_a_change_is_significant_when_its_interval_leaves_out_zero():
    assert is_significant((0.5, 2.0)) and is_significant((-3.0, -0.1))
    assert not is_significant((-1.0, 1.0)) and not is_significant((0.0, 2.0))
    assert not is_significant((0.0, 0.0)) and not is_significant(None)
    assert not is_significant((1e-14, 1.0))  # rounding is no change


def test_one_image_has_no_interval():
    assert Draws(np.full(10, 50.0), images=1).range is None
    several = Draws(np.arange(10.0), images=2)
    assert several.range is not None
    assert range_of_mean([several, Draws(np.zeros(10), images=1)]) is not None
    assert range_of_mean([several, None]) is None and range_of_mean([]) is None


def test_no_answers_have_no_interval():
    with pytest.raises(ValueError, match="no answers to draw"):
        mean_of([])


def test_a_picture_may_be_its_own_name():
    """MMBench's tables hold the pictures themselves."""
    pictures = [f"{number:03}" + 200_000 * "x" for number in range(100)]
    tracemalloc.start()
    units = mean_of([1.0] * 200, 2 * pictures)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(units.images) == 100 and peak < 5e6
