"""Hard questions: those that smaller images get wrong at the same budget."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
from torch.distributed import HashStore

from llava.eval.answering.loop import AnswerLoop
from llava.eval.answering.workers import Workers
from llava.eval.compare import report, suite, suite_report
from llava.eval.compare.budget import Budget
from llava.eval.compare.comparison import AVERAGE, compare_runs
from llava.eval.compare.costs import Cost
from llava.eval.files.answer_lines import Answer
from llava.model.block_encoding import UnfitBudget
from tests.eval import mini_benchmark


class Loop:
    """Says yes, and no to the second question: all methods in `wrong` at their budgets there."""

    def __init__(self, wrong):
        self.model, self.wrong = SimpleNamespace(pruner=None), wrong
        self.visual_tokens = None

    def run(self, batches, image_folder):
        pruner = self.model.pruner
        setting = pruner.name, getattr(pruner, "visual_token_num", None)
        for numbers, _ in batches:
            self.visual_tokens = (64, 64)
            yield (
                numbers,
                [Answer("No" if n and setting in self.wrong else "Yes") for n in numbers],
            )


def run(tmp_path, methods, wrong, loop=Loop):
    args = mini_benchmark.suite_args(tmp_path, [64, 16], methods=methods, pruning_arg=[])
    runs, benchmarks = suite.plan(args, 576), suite.available(["gqa", "vqav2"], args.data_dir)
    scores = suite.run_all(loop(wrong), runs, benchmarks, args)
    costs = {(run.method, run.budget): Cost(1, 1, 1, 1, 1) for run in runs}
    return scores, compare_runs(runs, scores, costs, benchmarks, args)


@pytest.fixture
def finished(tmp_path):
    """Smaller images get the second question wrong at 64, none at 16; so does pool at 64."""
    wrong = {("downsample", 64), ("pool", 64), ("random", 16)}
    return run(tmp_path, ["random", "pool", "downsample"], wrong)


def test_every_run_is_scored_on_what_smaller_images_get_wrong_at_its_budget(finished):
    scores, comparison = finished
    assert [(s.method, s.budget.tokens) for s in scores if s.task == "gqa"][:3] == [
        ("none", 576),
        ("downsample", 64),  # first: the others are compared with it
        ("downsample", 16),
    ]
    cells = {(row.method, row.budget.tokens): row.cells["gqa"] for row in comparison.rows}
    assert cells["random", 64].percent == 100 and cells["pool", 64].percent == 50
    hard = cells["random", 64].hard, cells["pool", 64].hard
    assert [(h.percent, h.change, h.count) for h in hard] == [(100, 0, 1), (0, -100, 1)]
    assert cells["random", 16].hard is None  # smaller images get nothing wrong there
    assert cells["none", 576].hard is None and cells["downsample", 64].hard is None


def test_the_report_has_a_table_of_them_for_budgets_that_have_some(finished):
    scores, comparison = finished
    text = report.markdown(comparison)
    assert text.count("**Hard questions at") == 1
    _, _, table = text.partition("**Hard questions at 64 tokens**: those that smaller images")
    assert table.split("\n\n")[1].splitlines() == [
        "| method | average | gqa (1) | vqav2 (1) |",
        "| --- | ---: | ---: | ---: |",
        "| unpruned | 100.0 | 100.0 | 100.0 |",
        "| `random` | 100.0 | 100.0 | 100.0 |",
        "| `pool` | 0.0 | 0.0 | 0.0 |",
    ]
    lines = report.csv_text(comparison).splitlines()
    place = lines[0].split(",").index("hard")
    pool = next(line for line in lines if line.startswith(f"pool,64,,{AVERAGE}"))
    assert pool.split(",")[place : place + 3] == ["0", "-100", "2"]
    assert "| on hard questions |  |  | 0.0 |  |" in suite_report.table(scores)


def test_without_a_run_on_smaller_images_nothing_is_said_of_hard_questions(tmp_path):
    scores, comparison = run(tmp_path, ["pool"], {("pool", 64)})
    assert "hard" not in report.markdown(comparison).lower()
    assert "hard" not in suite_report.table(scores)


class Refusing(Loop):
    """A method that learns only from an image that its budget does not fit."""

    def run(self, batches, image_folder):
        if self.model.pruner.name == "pool" and self.model.pruner.visual_token_num == 16:
            try:
                raise UnfitBudget("image 0, of 9 x 9 tokens: out of reach")
            except UnfitBudget as error:
                raise ValueError(f"question 7: {error}") from error
        yield from super().run(batches, image_folder)


def test_a_budget_that_does_not_fit_an_image_stops_that_setting_alone(tmp_path):
    scores, comparison = run(tmp_path, ["pool", "random"], set(), Refusing)
    settings = [(row.method, row.budget.tokens) for row in comparison.rows]
    assert settings == [("none", 576), ("pool", 64), ("random", 64), ("random", 16)]
    assert not [score for score in scores if (score.method, score.budget) == ("pool", Budget(16))]
    assert comparison.missing == [
        "- `pool` was not run at 16: image 0, of 9 x 9 tokens: out of reach"
    ]


def test_all_processes_go_on_when_a_budget_does_not_fit_the_image_of_one(tmp_path):
    args = mini_benchmark.suite_args(tmp_path, [16, 8], methods=["pool"], pruning_arg=[])
    benchmarks, store = suite.available(["gqa", "vqav2"], args.data_dir), HashStore()

    def of_one(rank):
        runs = suite.plan(args, 576)
        scores = suite.run_all(Refusing(set()), runs, benchmarks, args, Workers(rank, 2, store))
        return scores, [run.refused for run in runs]

    with ThreadPoolExecutor(2) as pool:
        (scores, told), (_, beside) = pool.map(of_one, (0, 1), timeout=600)
    reason = "image 0, of 9 x 9 tokens: out of reach"
    assert told == beside == [None, reason, None]
    assert {(score.method, score.budget.tokens) for score in scores} == {("none", 576), ("pool", 8)}


def test_the_answer_loop_says_whether_a_budget_did_not_fit():
    loop = object.__new__(AnswerLoop)
    for error in (UnfitBudget("out of reach"), ValueError("too long")):
        loop.generate = mock.Mock(side_effect=error)
        with pytest.raises(ValueError, match=f"question 1: {error}") as found:
            loop.answers([("question 1", []), ("question 2", [])])
        assert found.value.__cause__ is error
