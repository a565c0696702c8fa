"""The comparison on a model whose images have grids of their own: budgets as numbers and shares."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from llava.eval.answering.loop import AnswerLoop
from llava.eval.compare import gallery, program
from tests.eval import mini_benchmark
from tests.paths import GOLDEN

MODEL = GOLDEN / "tiny-qwen2.5-vl-cut"
TASKS = ["pope", "gqa"]
SETTINGS = ["--tokens", "8", "0.25", "100", "--methods", "random", "downsample", "cdpruner"]
#: the two images have 4 x 4 and 3 x 6 tokens within this bound
WHOLE = (16, 18)
BOUND = ["--max-pixels", str(24 * 28 * 28)]


def compare(folder: Path, data: Path, *words: str) -> dict:
    argv = ["--model-path", str(MODEL), "--data-dir", str(data), "--out", str(folder / "out")]
    argv += ["--device", "cpu", "--max-new-tokens", "2", "--timed-prompts", "4"]
    page = folder / "docs" / "Second.md"
    page.parent.mkdir(exist_ok=True)
    argv += ["--published", "--page", str(page), "--tasks", *TASKS, *BOUND, *words]
    program.main(argv)
    return json.loads((folder / "out" / "compare.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return mini_benchmark.build(tmp_path_factory.mktemp("own_grids") / "data")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """(folder, content of its compare.json)"""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("own_grids")
    return folder, compare(folder, data, *SETTINGS)


def test_numbers_and_shares_are_those_of_every_image(finished):
    kept = {
        (row["method"], row["budget"]["tokens"], row["budget"]["share"]): row["visual_tokens"]
        for row in finished[1]["rows"]
    }
    assert list(kept) == [
        ("none", None, None),
        ("downsample", None, 0.25),
        ("downsample", 100, None),
        ("downsample", 8, None),
        ("random", None, 0.25),
        ("random", 100, None),
        ("random", 8, None),
    ]
    assert kept["none", None, None] == sum(WHOLE) / 2
    assert kept["random", None, 0.25] == sum(round(0.25 * n) for n in WHOLE) / 2
    assert kept["random", 8, None] == 8
    assert kept["random", 100, None] == sum(WHOLE) / 2  # no image has more


def test_costs_are_measured_at_every_setting(finished):
    cost = {(row["method"], *row["budget"].values()): row["cost"] for row in finished[1]["rows"]}
    dense, few = cost["none", None, None], cost["random", None, 0.25]
    assert few["tokens_in"] == 4 and dense["tokens_in"] == sum(WHOLE) / 2
    assert few["flops"] < dense["flops"] and few["kv_bytes"] < dense["kv_bytes"]


def test_tables_files_and_plots_name_the_budgets(finished):
    folder, comparison = finished
    text = (folder / "out" / "compare.md").read_text()
    assert "17 visual tokens per question on average" in text
    for title in ("**8 to 17 visual tokens per layer**", "**By benchmark, 4 to 8 visual tokens"):
        assert title in text
    for budget in ("25 %", "100", "8"):
        assert f"| `random` | {budget} | " in text
    assert "`cdpruner` was not run at 25 %, 100, 8: cdpruner needs 'text_tower'" in text
    assert "The literature on qwen2.5-vl-7b has no number for these runs." in text
    with open(folder / "out" / "compare.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {(line["tokens"], line["share"]) for line in lines} == {
        ("", ""),
        ("", "0.25"),
        ("100", ""),
        ("8", ""),
    }
    assert len(lines) == len(comparison["rows"]) * (len(TASKS) + 1)
    page = (folder / "docs" / "Second.md").read_text()
    for axis in program.AXES:
        assert f"(../images/second_{axis}.png)" in page
        assert (folder / "images" / f"second_{axis}.png").stat().st_size > 5000
    (saved,) = gallery.read(folder / "docs" / "results")
    assert saved.settings["model_name"] == MODEL.name
    assert saved.settings["dtype"] in ("float32", "bfloat16") and saved.settings["device"] == "cpu"
    assert f"Model `{MODEL.name}` in {saved.settings['dtype']} (cpu), " in text
    assert len(saved.rows) == len(comparison["rows"])


def test_a_comparison_goes_on_with_the_answers_it_has(finished, data, monkeypatch):
    folder, before = finished
    asked = []
    generate = AnswerLoop.generate
    monkeypatch.setattr(
        AnswerLoop, "generate", lambda loop, batch: asked.extend(batch) or generate(loop, batch)
    )
    again = compare(folder, data, *SETTINGS)
    assert not asked  # dense answers say as well how many tokens their image has
    pairs = zip(again["rows"], before["rows"], strict=True)
    assert all(new["visual_tokens"] == old["visual_tokens"] for new, old in pairs)
    with pytest.raises(SystemExit, match="max_pixels was 18816 and is now 12544"):
        compare(folder, data, *SETTINGS, "--max-pixels", "12544")
    (folder / "out" / "answers" / "random" / "n_0.25" / "gqa.jsonl").unlink()
    compare(folder, data, *SETTINGS)
    assert len(asked) == 2
