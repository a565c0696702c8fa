"""Runs grouped by cost, the methods that a plot shows in colour, and the page of all results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llava.eval.compare import gallery, pages
from llava.eval.compare.budget import Budget
from llava.eval.compare.comparison import AVERAGE, Cell, Comparison, Row
from llava.eval.compare.costs import Cost
from llava.eval.compare.groups import by_cost
from llava.eval.compare.hard import HardCell
from llava.eval.compare.plot import COLORS, leaders, plot
from llava.eval.compare.report import BY_HAND
from llava.eval.compare.scores import DENSE
from llava.eval.compare.suite_report import brief
from tests.paths import ROOT


def row(method: str, label: int | None, kept: float, percent: float) -> Row:
    change = percent - 90
    hard = HardCell(percent / 2, 2 * change, (2 * change - 1, 2 * change + 1), 12)
    whole = (percent - 1, percent + 1)
    cell = Cell(percent, whole, change, (change - 1.5, change + 1.5), 80.123456789, 40, hard=hard)
    cost = Cost(kept, kept, 1e4 * kept, 1e9 * kept, 0.001 * kept)
    return Row(method, Budget(tokens=label), {AVERAGE: cell, "pope": cell}, cost, kept, None)


def comparison(name: str = "small", *rows: Row) -> Comparison:
    return Comparison({"model_name": name}, [row(DENSE, 576, 576, 90), *rows], ["- not run: one"])


def test_runs_are_grouped_by_the_tokens_they_have_and_not_by_their_label():
    found = by_cost(
        comparison(
            "small",
            row("first", 64, 64, 80),
            row("second", 64, 149, 85),
            row("third", 192, 149, 87),
            row("rounded", 64, 73, 70),
        )
    )
    assert [[own.method for own in group.rows] for group in found] == [
        ["third", "second"],
        ["first", "rounded"],
    ]
    assert [group.title for group in found] == [
        "144 to 288 visual tokens per layer",
        "36 to 72 visual tokens per layer",
    ]


def test_a_run_that_keeps_more_than_the_unpruned_average_is_in_the_largest_group():
    (group,) = by_cost(comparison("small", row("first", 575, 600, 80)))
    assert group.most == 576 and len(group.rows) == 1


def test_the_methods_in_colour_are_those_that_nothing_cheaper_beats():
    best = [row("best", 64, 64, 85), row("best", 192, 192, 89)]
    dear = [row("dear", 64, 400, 88.5)]
    others = [row(f"other{n}", 64, 64, 60 + n) for n in range(6)]
    smaller = [row("downsample", 64, 30, 40), row("downsample", 192, 60, 89.5)]
    found = leaders(comparison("small", *others, *dear, *best, *smaller))
    assert len(found) == len(COLORS)
    assert found[:2] == ["best", "dear"] and "other0" not in found and "other5" in found
    assert "downsample" not in found, "the reference is no method to look at"


def test_all_pictures_of_a_page_show_the_same_methods_in_the_same_colours(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    names = [f"m{n}" for n in range(7)]
    runs = [row(n, 64, 64 + 20 * i, 70 + i) for i, n in enumerate(names)]
    for number, own in enumerate(runs):
        own.cost.seconds = 1.0 - 0.1 * number  # dear by tokens is cheap by time
    shown, below = [], []
    for axis in ("tokens", "flops", "time"):
        plot(comparison("small", *runs, row("downsample", 64, 40, 20)), axis, tmp_path / "one.png")
        figure = pyplot.gcf()
        large = figure.axes[0]
        shown.append({text.get_text(): text.get_color() for text in large.texts})
        below.append((large.get_ylim()[0] > 20, "downsample (20.0)" in figure.get_supxlabel()))
        frame = large.get_window_extent()
        boxes = [text.get_window_extent() for text in large.texts]
        assert all(frame.contains(*box.min) and frame.contains(*box.max) for box in boxes)
        pairs = [(a, b) for a in boxes for b in boxes if a is not b]
        assert not any(a.overlaps(b) for a, b in pairs), "a name over another one"
    assert shown[0] == shown[1] == shown[2] and set(shown[0]) == set(names[2:])
    assert below == [(True, True)] * 3


def test_results_are_read_as_they_were_saved(tmp_path):
    own = comparison("small", row("first", 64, 64.123456, 80))
    path = gallery.save(own, tmp_path / "results")
    assert path.name == "small.json"
    (again,) = gallery.read(tmp_path / "results")
    assert again.missing == own.missing and again.settings == own.settings
    kept = again.rows[1]
    assert kept.visual_tokens == pytest.approx(64.123456, abs=1e-4)
    assert kept.budget == Budget(tokens=64) and kept.cells["pope"].hard.count == 12
    assert replace(kept, cells={}, visual_tokens=0.0).method == "first"


def test_a_page_puts_models_beside_one_another():
    first = comparison("one", row("good", 64, 64, 89), row("poor", 64, 149, 70))
    second = comparison("two", row("poor", 64, 64, 75), row("good", 192, 192, 90))
    page = gallery.gallery([first, second])
    tables = page.split("## ")
    assert [text.partition("\n")[0] for text in tables[1:-1]] == [
        "33.3 % of the tokens",
        "11.1 % of the tokens",
    ]
    rows = [line for line in tables[2].splitlines() if line.startswith("| `")]
    assert rows == [
        "| `good` | 11.1 | -1.0 [-2.5, +0.5] | **-2.0** | 80.1 | – | – | – | – |",
        "| `poor` | 25.9 | **-20.0 [-21.5, -18.5]** | **-40.0** | 80.1 | 11.1 "
        "| **-15.0 [-16.5, -13.5]** | **-30.0** | 80.1 |",
    ]
    assert "`one`: 40 questions, unpruned 90.0 [89.0, 91.0]" in page
    assert "| method | two: kept, % | change |" in tables[1] and "one" not in tables[1]


@pytest.mark.parametrize("text", ["{}", "[1]", '{"rows": [{}], "settings": {}, "missing": []}'])
def test_a_file_of_something_else_is_named(tmp_path, text):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ValueError, match=r"odd\.json: this is no comparison"):
        gallery.read(tmp_path)


def test_a_folder_without_results_says_what_writes_them(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no results.*llava\.eval\.compare --page"):
        gallery.main(["--results", str(tmp_path)])


def test_empty_cells_are_explained_with_the_reasons_that_the_numbers_give():
    first = comparison("one", row("good", 64, 64, 89))
    second = comparison("two", row("odd", 64, 64, 75))
    first.missing = ["- `odd` was not run at 64: it has no part that fits: name one"]
    second.missing = []
    text = gallery.gallery([first, second]).split("## What – means")[1]
    assert "| one | `odd` | 64 | it has no part that fits: name one |" in text
    assert "| two | `good` | all | not asked for |" in text and text.count("\n| one ") == 1


def test_reasons_on_a_page_leave_out_long_lists_of_names():
    long = "it needs keys (it gives a, b), choose another method (a, b_c, d, e, f, g), or a model"
    assert brief(long) == "it needs keys (it gives a, b), choose another method, or a model"
    assert brief("choose one (a, b, c)") == "choose one (a, b, c)"


def test_pages_of_single_models_are_what_the_numbers_say():
    found = [own for own in gallery.read(ROOT / gallery.RESULTS) if "page" in own.settings]
    assert found
    for own in found:
        page = ROOT / "docs" / own.settings["page"]["file"]
        assert page.read_text(encoding="utf-8") == pages.text(own, page.parent)
        for name in pages.pictures(own).values():
            assert (ROOT / "images" / name).exists()


def test_a_page_and_its_pictures_are_written_again_without_answering(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    docs = tmp_path / "docs"
    own = comparison("one", row("good", 64, 64, 89))
    own.settings |= {"limit": 1} | pages.origin("x/Page.md", "llava compare", None, ["good"])
    gallery.save(own, docs / "results")
    gallery.save(comparison("old", row("good", 64, 64, 89)), docs / "results")
    (docs / "Page.md").write_text(f"lost\n\n{BY_HAND}\nkept\n")
    gallery.main(["--results", str(docs / "results"), "--page", str(docs / "All.md"), "--pages"])
    page = (docs / "Page.md").read_text(encoding="utf-8")
    assert "```bash\nllava compare\n```" in page and page.endswith(f"{BY_HAND}\nkept\n")
    assert "lost" not in page and "](../images/page_tokens.png)" in page
    assert len(list((tmp_path / "images").glob("page_*.png"))) == 3
    assert "old: its numbers do not name a page" in capsys.readouterr().out


def test_the_page_of_all_results_is_what_the_numbers_say():
    found = sorted((ROOT / "docs" / "results").glob("*.json"))
    assert found and all(path.stat().st_size < 500_000 for path in found)
    assert all(json.loads(path.read_text())["rows"] for path in found)
    page = Path(ROOT / gallery.PAGE).read_text(encoding="utf-8")
    assert page == gallery.gallery(gallery.read(ROOT / gallery.RESULTS))
