"""Intervals draw images with all their questions; every benchmark has units that add up to its
score."""

import os
import random
import tracemalloc

import numpy as np
import pytest

from llava.eval.benchmarks import find_benchmark, mme, scored_here
from llava.eval.benchmarks.data_files import PLAYGROUND_DIRS
from llava.eval.scoring.bootstrap import Draws, is_significant
from llava.eval.scoring.paired import agreement, compare, range_of_mean
from llava.eval.scoring.units import COUNTS, WEIGHT, Unit, Units, ratio
from tests.eval.eval_cases import ROOT
from tests.eval.invented_units import mean_of

SAID = ("A", "Yes", "B", "[0.1, 0.2, 0.6, 0.7]", "No", "red", "C")


def data_of(benchmark):
    folders = [ROOT / name for name in PLAYGROUND_DIRS]
    return next(str(f) for f in folders if (f / benchmark.questions).exists())


def answers_of(benchmark, path):
    return [
        question.answer_line(SAID[number % len(SAID)], str(number), "m")
        for number, question in enumerate(benchmark.select(benchmark.read(path)))
    ]


def width(units):
    low, high = units.draw(seed=0).range
    return high - low


def texts_of(units):
    said = ([unit.said] if isinstance(unit.said, str) else unit.said for unit in units.found)
    return sorted(text for texts in said for text in texts)


@pytest.mark.parametrize("name", sorted(scored_here()))
def test_units_make_the_score_and_the_interval_on_the_playground(name):
    benchmark = find_benchmark(name)
    folder = data_of(benchmark)
    path = os.path.join(folder, benchmark.questions)
    answers = answers_of(benchmark, path)
    units = benchmark.score(folder, benchmark.read(path), answers, None)
    draws = units.draw(seed=0, count=200)
    low, high = draws.range
    assert low - 1e-9 <= units.percent <= high + 1e-9
    questions = benchmark.select(benchmark.read(path))
    if name == "sqa":
        questions = [question for question in questions if question.images]
    assert draws.images == len({question.images[0] for question in questions})
    assert units.count == len(questions)
    assert texts_of(units) == sorted(answer["text"] for answer in answers)
    random.Random(0).shuffle(answers)
    shuffled = benchmark.score(folder, benchmark.read(path), answers, None)
    assert np.array_equal(shuffled.draw(seed=0, count=200).scores, draws.scores)
    assert compare(shuffled, units).same == 100


def test_questions_that_stand_or_fall_together_count_as_one():
    right = np.random.default_rng(0).integers(0, 2, 300)
    once = mean_of(right, [str(n) for n in range(300)])
    six_times = mean_of(np.repeat(right, 6), [str(n) for n in np.repeat(range(300), 6)])
    assert width(six_times) == pytest.approx(width(once), rel=1e-9)
    unaware = mean_of(np.repeat(right, 6))
    assert width(once) / width(unaware) == pytest.approx(6**0.5, rel=0.1)


def test_a_group_that_a_draw_has_nothing_of_does_not_lower_it():
    right, wrong = Unit(1, 1.0, "", "a", ("x",)), Unit(2, 0.0, "", "b", ("y",))
    draws = Units([right, wrong], macro=True).draw(seed=0)
    # A draw has both images, or one of them twice; the group of the other is not in its mean.
    assert set(draws.scores.tolist()) == {0.0, 50.0, 100.0}


def f1(sums):
    right, wrong, missed = np.moveaxis(sums[..., COUNTS:], -1, 0)
    return 100 * ratio(2 * right, 2 * right + wrong + missed)


def test_ratios_of_sums_are_drawn_like_means():
    """F1 = 2 right / (2 right + wrong + missed), against a bootstrap written out."""
    rng = np.random.default_rng(3)
    values = rng.integers(0, 2, (40, 3)).astype(float)
    images = [f"{n // 4:02}" for n in range(40)]
    pairs = enumerate(zip(values, images, strict=True))
    units = Units([Unit(key, 0, "", image, counts=tuple(row)) for key, (row, image) in pairs], f1)
    by_hand = np.random.default_rng(7)
    groups = [[n for n in range(40) if images[n] == image] for image in sorted(set(images))]
    expected = []
    for _ in range(50):
        rows = [n for g in by_hand.integers(len(groups), size=len(groups)) for n in groups[g]]
        right, wrong, missed = values[rows].sum(axis=0)
        expected.append(100 * 2 * right / (2 * right + wrong + missed))
    assert units.draw(seed=7, count=50).scores == pytest.approx(expected)


def test_a_weight_counts_a_unit_more_often_or_not_at_all():
    weights = {"a": 3, "b": 1, "c": 0}
    units = Units([Unit(k, k == "a", "", k, weight=weight) for k, weight in weights.items()])
    assert units.percent == 75 and units.count == 4 and units.draws.images == 2


def test_a_group_without_answers_is_reported_and_not_averaged():
    own = Unit(1, 1, "", "a", ("x",), counts=(1, 0, 0))
    units = Units([own], f1, macro=True, groups=("x", "y"))
    assert units.result()["groups"] == {"x": [100.0, 1], "y": [0.0, 0]}
    assert units.percent == 100
    assert Units([], f1, macro=True).result() == {"score": 0.0, "percent": 0.0, "count": 0}


def run_of(values, texts, groups="gghh"):
    return Units(
        [
            Unit(key, value, text, f"image {key}", (group,))
            for key, (value, text, group) in enumerate(zip(values, texts, groups, strict=True))
        ],
        name="invented",
    )


def test_a_unit_is_reported_under_each_of_its_groups():
    units = Units([Unit(0, 1.0, "", groups=("a", "b")), Unit(1, 0.0, "", groups=("a",))])
    assert {name: (part.percent, part.count) for name, part in units.by_group().items()} == {
        "a": (50.0, 2),
        "b": (100.0, 1),
    }


def test_a_macro_score_is_the_mean_over_the_first_groups():
    found = [Unit(0, 1.0, "", groups=("a", "even")), Unit(1, 0.0, "", groups=("a", "odd"))]
    found.append(Unit(2, 1.0, "", groups=("b", "even")))
    assert Units(found, macro=True).percent == 75


def test_each_of_several_answers_of_a_unit_agrees_or_not():
    own, other = (Units([Unit(0, 1.0, said)]) for said in (("yes", "no"), ("yes", "yes")))
    assert agreement(own, other) == 50


def test_groups_agreement_and_change_come_from_the_units_of_two_runs():
    dense, own = run_of([1, 1, 0, 1], "abcd"), run_of([1, 0, 1, 1], "axyd")
    assert {name: part.percent for name, part in own.by_group().items()} == {"g": 50, "h": 100}
    assert own.result()["groups"] == {"g": [50.0, 2], "h": [100.0, 2]}
    assert agreement(own, dense) == 50
    change = compare(own, dense)
    assert change.percent == 0 and change.same == 50
    assert np.array_equal(change.draws.scores, own.draws.scores - dense.draws.scores)
    # The first question failed: what changed is seen on the others, on images drawn among them.
    lost = compare(own.only({1, 2, 3}), dense)
    assert lost.percent == 0 and lost.draws.images == 3 and lost.same == pytest.approx(100 / 3)
    with pytest.raises(ValueError, match="no question was answered by this run and by"):
        compare(own.only({0}), dense.only({1}))


def test_answers_that_do_not_count_are_no_agreement():
    own, dense = run_of([1, 1], "ab", "gg"), run_of([1, 1], "ax", "gg")
    for units in (own, dense):  # text alone, which no method touches
        units.found[0] = units.found[0]._replace(weight=0)
    assert agreement(own, dense) == 0


def test_the_hard_subset_is_what_down_sampling_gets_wrong():
    downsampled, own = run_of([1, 0.5, 0, 1], "abcd"), run_of([1, 1, 0, 0], "abcd")
    hard = own.hard(downsampled)
    assert [unit.key for unit in hard.found] == [1, 2]
    assert own.percent == 50 and hard.percent == 50 and downsampled.hard(downsampled).percent == 25
    assert hard.draws.images == 2 and {*hard.by_group()} == {"g", "h"}


@pytest.mark.parametrize("name", ["pope", "gqa", "sqa"])
def test_the_hard_subset_of_a_benchmark_has_a_score_by_its_own_rule(name):
    benchmark = find_benchmark(name)
    folder = data_of(benchmark)
    path = os.path.join(folder, benchmark.questions)
    units = benchmark.score(folder, benchmark.read(path), answers_of(benchmark, path), None)
    hard = units.hard(units)
    assert 0 < len(hard.found) < len(units.found) and hard.percent < units.percent
    assert hard.draws.images <= units.draws.images and hard.sums[WEIGHT] == hard.count
    assert units.hard(units.only(())).found == []


def test_the_hard_images_of_mme_are_scored_by_task():
    run = lambda said: mme.units(  # noqa: E731
        {"OCR": [f"{n}.txt\t{q}\tYes\t{text}" for n, text in enumerate(said) for q in "pq"]}
    )
    downsampled, own = run(["No", "No", "Yes"]), run(["Yes", "No", "No"])
    hard = own.hard(downsampled)
    assert own.percent == pytest.approx(100 / 3) and hard.percent == 50 and hard.count == 4


def test_pope_draws_images_across_its_categories():
    benchmark = find_benchmark("pope")
    folder = data_of(benchmark)
    path = os.path.join(folder, benchmark.questions)
    units = benchmark.units(folder, benchmark.read(path), answers_of(benchmark, path))
    # Every image brings all of its questions: a draw has each category as often as another.
    assert len(units.found) == 3 * units.draws.images == 720
    assert [part.count for part in units.by_group().values()] == 3 * [240]


def test_draws_need_no_table_of_all_questions():
    points = np.random.default_rng(0).integers(0, 2, 100_000)
    units = mean_of(points, [str(n // 3) for n in range(100_000)])
    tracemalloc.start()
    try:
        units.draw(seed=0, count=100)
        assert tracemalloc.get_traced_memory()[1] < 50e6  # (100, 33334) numbers twice are 53 MB
    finally:
        tracemalloc.stop()


def test_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    units = mean_of(np.arange(100) % 3 == 0)
    together = units.draw(seed=1, count=30).scores
    monkeypatch.setattr("llava.eval.scoring.bootstrap.CHUNK", 700)
    assert np.array_equal(units.draw(seed=1, count=30).scores, together)


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


def test_the_interval_of_a_mean_is_that_of_the_means_of_each_draw():
    rising = Draws(np.arange(101.0), images=2)
    assert range_of_mean([rising, rising]) == rising.range
    falling = Draws(np.arange(100.0, -1.0, -1.0), images=2)
    assert range_of_mean([rising, falling]) == (50, 50)


def test_no_answers_have_no_interval():
    with pytest.raises(ValueError, match="no answers to draw"):
        mean_of([]).draw(seed=0)


def test_a_picture_may_be_its_own_name():
    """MMBench's tables hold the pictures themselves."""
    pictures = [f"{number:03}" + 200_000 * "x" for number in range(100)]
    units = mean_of([1.0] * 200, 2 * pictures)
    tracemalloc.start()
    draws = units.draw(seed=0, count=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert draws.images == 100 and peak < 5e6
