"""The comparison: intervals, agreement, costs, and the literature's numbers."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llava.eval.benchmarks import scored_here
from llava.eval.compare import report as compare_report
from llava.eval.compare import suite
from llava.eval.compare.budget import Budget, budget_of
from llava.eval.compare.comparison import AVERAGE, compare_runs
from llava.eval.compare.costs import Cost, measure_costs
from llava.eval.compare.plot import plot
from llava.eval.compare.published import (
    SAME_RULE,
    model_beside,
    published_table,
    read_published,
)
from llava.eval.efficiency.measure import Workload
from llava.eval.files.answer_lines import Answer
from llava.eval.files.records import read_jsonl
from llava.pruning import METHODS, build_pruner
from tests.eval import mini_benchmark
from tests.eval.invented_units import mean_of
from tests.paths import ROOT


class FakeLoop:
    """Says yes to everything, and to options A; a pruned model says no to every second question."""

    conv_mode, max_new_tokens = "vicuna_v1", 8

    def __init__(self):
        self.model = SimpleNamespace(pruner=None)
        self.visual_tokens = None

    def run(self, batches, image_folder):
        pruned = self.model.pruner.name != "none"
        for numbers, questions in batches:
            texts = ["A" if "A. red" in question.text else "Yes" for question in questions]
            self.visual_tokens = (64, 64)
            yield (
                numbers,
                [
                    Answer("No" if pruned and number % 2 else text)
                    for number, text in zip(numbers, texts, strict=True)
                ],
            )


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    return mini_benchmark.suite_args(
        folder,
        methods=["random", "mustdrop"],
        tokens=[64, 16],
        pruning_arg=[],
    )


@pytest.fixture(scope="module")
def finished(args):
    """(runs, scores, benchmarks, comparison) of a comparison with invented costs."""
    runs, loop = suite.plan(args, num_tokens=576), FakeLoop()
    benchmarks = suite.available(None, args.data_dir)
    scores = suite.run_all(loop, runs, benchmarks, args)
    costs = {
        (run.method, run.budget): Cost(tokens, tokens, 1e4 * tokens, 1e9, 0.01)
        for run in runs
        if (tokens := run.budget.tokens)
    }
    return runs, scores, benchmarks, compare_runs(runs, scores, costs, benchmarks, args)


def test_units_add_up_to_the_score_of_the_benchmark(finished, args):
    runs, scores, benchmarks, _ = finished
    names = {benchmark.name for benchmark in benchmarks}
    assert {"pope", "mme", "textvqa", "vqav2", "gqa", "sqa", "refcoco"} <= names
    for run in runs[:2]:
        for benchmark in benchmarks:
            answers = read_jsonl(suite.answers_path(args.out, run, benchmark))
            questions = os.path.join(args.data_dir, benchmark.questions)
            units = benchmark.units(args.data_dir, benchmark.read(questions), answers)
            (score,) = [
                s for s in scores if (s.method, s.budget) == (run.method, run.budget)
                and s.task == benchmark.name
            ]  # fmt: skip
            assert units.percent == pytest.approx(score.percent), benchmark.name


def test_units_agree_with_the_scorer_on_many_answers():
    """F1 is no mean of questions, nor is MME's score: on the playground's questions, half of the
    answers wrong."""
    from llava.eval.benchmarks import find_benchmark
    from llava.playground import benchmark_dir

    folder = benchmark_dir()
    for name in ("pope", "mme", "gqa"):
        benchmark = find_benchmark(name)
        path = os.path.join(folder, benchmark.questions)
        said = ("Yes", "No", "yes, it is")
        answers = [
            question.answer_line(said[number % 3], str(number), "m")
            for number, question in enumerate(benchmark.select(benchmark.read(path)))
        ]
        units = benchmark.score(folder, benchmark.read(path), answers, None)
        low, high = units.draw(seed=0, count=200).range
        assert low < units.percent < high


def test_the_interval_of_a_share_is_as_wide_as_its_formula_says():
    low, high = mean_of([1.0] * 60 + [0.0] * 40).draw(seed=1).range
    half = 196 * (0.6 * 0.4 / 100) ** 0.5
    assert low == pytest.approx(60 - half, abs=2) and high == pytest.approx(60 + half, abs=2)


def test_changes_are_paired_question_by_question():
    points = np.random.default_rng(0).integers(0, 2, 200).astype(float)
    other = points.copy()
    other[:4] = 1 - other[:4]
    draws = [mean_of(p).draw(seed=5) for p in (points, other)]
    low, high = draws[0].minus(draws[1]).range
    assert high - low < 5  # four of 200 differ; unpaired it would be about 20
    same = mean_of(points).draw(seed=5)
    assert np.array_equal(same.scores, draws[0].scores)


def test_rows_say_score_change_agreement_and_cost(finished):
    _, scores, benchmarks, comparison = finished
    dense, pruned = comparison.rows[:2]
    assert dense.method == "none" and dense.cells[AVERAGE].change == 0
    assert dense.cells[AVERAGE].change_range == (0, 0) and dense.cells[AVERAGE].loyalty == 100
    cell = pruned.cells["pope"]
    assert cell.loyalty == 50  # the second of two questions is answered otherwise
    assert cell.change == pytest.approx(cell.percent - dense.cells["pope"].percent)
    assert cell.range[0] <= cell.percent <= cell.range[1]
    average = [
        score.percent for score in scores if score.method == "random" and score.budget == Budget(64)
    ]
    assert pruned.cells[AVERAGE].percent == pytest.approx(sum(average) / len(benchmarks))


def test_budgets_a_method_does_not_know_are_named_with_the_reason(finished):
    runs, _, _, comparison = finished
    refused = [run for run in runs if run.refused]
    assert [(run.method, run.budget.tokens) for run in refused] == [("mustdrop", 16)]
    (line,) = comparison.missing
    assert line.startswith("- `mustdrop` was not run at 16:") and "192, 128, 64" in line
    assert line in compare_report.markdown(comparison)


def test_a_method_that_refuses_the_model_is_known_before_anything_runs(model):
    runs = [
        suite.Run("random", Budget(5), build_pruner("random", visual_token_num=5)),
        suite.Run("random", Budget(99), build_pruner("random", visual_token_num=99)),
    ]
    suite.try_out(model, runs, "m")
    assert runs[0].refused is None and "exceeds the 36 patches" in runs[1].refused


@pytest.mark.parametrize("given", ["checkpoints/own", os.path.abspath("checkpoints/own")])
def test_a_reason_calls_the_model_by_its_name_however_it_was_given(model, monkeypatch, given):
    runs = [suite.Run("random", Budget(5), build_pruner("random", visual_token_num=5))]
    reason = f"nothing fits {os.path.abspath('checkpoints/own')}, or {given}"

    def refuse(self, value):
        raise ValueError(reason)

    monkeypatch.setattr(type(model), "pruner", property(fset=refuse))
    suite.try_out(model, runs, given)
    assert runs[0].refused == "nothing fits own, or own"


def test_table_file_and_plots_hold_every_run(finished, tmp_path):
    _, _, benchmarks, comparison = finished
    lines = list(csv.DictReader(io.StringIO(compare_report.csv_text(comparison))))
    assert len(lines) == len(comparison.rows) * (len(benchmarks) + 1)
    assert {line["method"] for line in lines} == {"none", "random", "mustdrop"}
    first = next(r for r in lines if (r["method"], r["task"]) == ("random", AVERAGE))
    assert float(first["visual_tokens"]) == 64 and float(first["change_low"]) < 0
    text = compare_report.markdown(comparison)
    assert text.count("| `random` |") == 4  # two budgets, averages and benchmarks
    shown = compare_report.page(
        text, {"tokens": "results_tokens.png"}, "python -m x --page y", "some model"
    )
    assert "(../images/results_tokens.png)" in shown and "python -m x --page y" in shown
    assert shown.startswith("# Results on the playground: some model\n")
    pytest.importorskip("matplotlib")
    for axis in ("tokens", "flops", "time"):
        plot(comparison, axis, tmp_path / f"{axis}.png")
        assert (tmp_path / f"{axis}.png").stat().st_size > 5000


def test_answers_per_second_have_a_column_where_a_run_has_some(finished):
    comparison = deepcopy(finished[3])
    for row in comparison.rows:
        row.answers_per_second = None
    assert "answers/s" not in compare_report.markdown(comparison)
    comparison.rows[1].answers_per_second = 7.25
    text = compare_report.markdown(comparison)
    assert "| answers/s |" in text and text.count(" 7.2 |") == 1


def test_what_was_written_by_hand_survives_the_next_page(tmp_path):
    path = tmp_path / "page.md"
    assert compare_report.by_hand(str(path)) == ""
    path.write_text("generated")
    assert compare_report.by_hand(str(path)) == ""
    hand = f"\n{compare_report.BY_HAND}\nMine.\n"
    for generated in ("old\n", "new\n"):
        path.write_text(generated + hand)
        assert compare_report.by_hand(str(path)) == hand


def test_costs_are_measured_on_prompts(model):
    prompts = [Workload.random(model, 1, 8, 1) for _ in range(2)]
    runs = [suite.Run("none", Budget(36), build_pruner())]
    runs.append(suite.Run("random", Budget(5), build_pruner("random", visual_token_num=5)))
    runs.append(suite.Run("fastv", Budget(5), None, "out of reach"))
    costs = measure_costs(model, runs, prompts)
    assert costs.keys() == {("none", Budget(36)), ("random", Budget(5))}
    small, large = costs["random", Budget(5)], costs["none", Budget(36)]
    assert small.tokens_mean == 5 and small.flops < large.flops
    assert small.kv_bytes / large.kv_bytes == pytest.approx((5 + 8) / (36 + 8))
    assert small.seconds > 0 and model.pruner.name == "none"
    assert torch.is_grad_enabled()


def test_published_numbers_have_one_value_per_row_with_source_and_status():
    rows = read_published()
    names = "model method variant budget unit benchmark metric protocol source".split()
    keys = Counter(tuple(getattr(row, name) for name in names) for row in rows)
    assert len(rows) > 1000 and max(keys.values()) == 1
    assert all(row.source and row.value > 0 for row in rows)
    assert all((row.method == "none") == (row.convention == "unpruned") for row in rows)
    ours = {row.method for row in rows} & METHODS.keys()
    assert {"fastv", "nuwa", "vispruner", "cdpruner", "twigvlm", "prumerge"} <= ours
    (value,) = [
        row.value for row in rows
        if (row.model, row.method, row.budget) == ("llava-1.5-7b", "nuwa", 64)
        and row.benchmark == "refcoco_val"
    ]  # fmt: skip
    assert value == 28.60


def test_published_numbers_stand_beside_ours_as_shares_of_their_own_unpruned_score(finished):
    comparison = finished[3]
    text = published_table(comparison, read_published(), "llava-1.5-7b")
    assert "`mustdrop`" not in text  # published at 192 only, which was not run here
    comparison.rows[1].method = "divprune"
    text = published_table(comparison, read_published(), "llava-1.5-7b")
    comparison.rows[1].method = "random"
    assert "| `divprune` | 64 | gqa |" in text and "92.9 (57.5) | EADP | copied |" in text
    with pytest.raises(ValueError, match="choose from llava-1.5-13b, llava-1.5-7b"):
        published_table(comparison, read_published(), "gpt-2")


def test_a_broken_row_of_the_literature_is_named(tmp_path):
    path = tmp_path / "numbers.csv"
    lines = (ROOT / "docs" / "published_numbers.csv").read_text().splitlines()[:2]
    path.write_text("\n".join([lines[0], lines[1].replace("own", "heard")]) + "\n")
    with pytest.raises(ValueError, match="line 2: status 'heard'"):
        read_published(str(path))


def test_every_benchmark_that_the_literature_has_and_we_score_is_compared(finished):
    rows, comparison = read_published(), deepcopy(finished[3])
    known = {(row.benchmark, row.metric) for row in rows}
    ours = {
        (own, benchmark.metric): name
        for name, benchmark in scored_here().items()
        for own in (name, f"{name}_val")
        if (own, benchmark.metric) in known
    }
    assert {"vizwiz_val", "seed", "refcoco+_testA", "refcocog"} <= set(ours.values())
    assert {SAME_RULE.get(name): name for name in ours.values()} == ours
    for row in comparison.rows:
        row.cells["vizwiz_val"] = row.cells["gqa"]
    comparison.rows[1].method = "divprune"
    text = published_table(comparison, rows, "llava-1.5-7b")
    assert "| `divprune` | 64 | vizwiz_val |" in text and "104.0 (57.8) | EADP |" in text


def test_published_circular_accuracies_stand_beside_circular_ones_only(finished):
    rows, comparison = read_published(), finished[3]
    assert {r.metric for r in rows if r.benchmark.startswith("mmbench")} == {
        "circular accuracy",
        "as printed",
    }
    row, dense = comparison.rows[1], comparison.dense
    before, row.method = row.method, "divprune"
    text = published_table(comparison, rows, "llava-1.5-7b")
    assert "| mmbench |" not in text
    assert "mmbench is not compared: ours is plain accuracy, the literature's is circular" in text
    for one in (row, dense):
        one.cells["mmbench"].metric = "circular accuracy"
    text = published_table(comparison, rows, "llava-1.5-7b")
    assert "| `divprune` | 64 | mmbench |" in text and "not compared" not in text
    for one in (row, dense):
        one.cells["mmbench"].metric = "plain accuracy"
    row.method = before


def test_published_shares_stand_beside_ours_with_what_their_source_says(finished):
    comparison = finished[3]
    row = comparison.rows[1]
    before = row.method, row.budget
    row.method, row.budget = "divprune", budget_of("0.222")
    text = published_table(comparison, read_published(), "qwen2.5-vl-7b")
    row.method, row.budget = before
    assert "| `divprune` | 22.2 % | pope |" in text
    assert "97.0 (84.1) | 2606.01711 | rerun | as printed |" in text
    assert "25 %" not in text and "| mmbench |" not in text


@pytest.mark.parametrize(
    "model_type, layers, shape, beside",
    [
        ("llava_llama", 6, "pad", "llava-1.5-7b"),  # the playground's
        ("llava_llama", 32, "pad", "llava-1.5-7b"),
        ("llava_llama", 32, "anyres", "llava-next-7b"),
        ("llava_llama", 40, "pad", "llava-1.5-13b"),
        ("llava_llama", 40, "anyres", "llava-next-13b"),
        ("qwen2_5_vl", 28, None, "qwen2.5-vl-7b"),
    ],
)
def test_the_literature_beside_a_model_is_that_of_its_family_and_size(
    model_type, layers, shape, beside
):
    config = SimpleNamespace(
        model_type=model_type, num_hidden_layers=layers, image_aspect_ratio=shape
    )
    assert model_beside("", config) == beside
    assert model_beside("llava-next-7b", config) == "llava-next-7b"
    with pytest.raises(ValueError, match="choose from llava-1.5-13b, llava-1.5-7b, llava-next-13b"):
        model_beside("gpt-2", config)


def test_a_larger_model_is_not_compared_with_the_literature_on_13b():
    shape = {"model_type": "llava_llama", "image_aspect_ratio": "anyres"}
    config = SimpleNamespace(**shape, num_hidden_layers=60)  # of LLaVA-NeXT-34B
    with pytest.raises(ValueError, match="no published numbers of a LLaVA with 60 decoder layers"):
        model_beside("", config)
    assert model_beside("llava-next-13b", config) == "llava-next-13b"


def test_published_numbers_of_13b_stand_beside_ours(finished):
    comparison = finished[3]
    row = comparison.rows[1]
    before, row.method = row.method, "twigvlm_plus"
    text = published_table(comparison, read_published(), "llava-1.5-13b")
    row.method = before
    assert "| `twigvlm_plus` | 64 | gqa |" in text and "96.5 (61) | 2503.14075 | own |" in text
