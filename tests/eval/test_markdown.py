"""Markdown tables, as every report writes them, and their places on a page."""

import pytest

from llava.eval.markdown import table, write_between_marks


def test_the_last_alignment_holds_for_the_columns_behind_it():
    text = table(["a", "b", "c"], [["x", 1, 2.5], ["y", "", None]], "lr")
    lines = ["| a | b | c |", "| --- | ---: | ---: |", "| x | 1 | 2.5 |", "| y |  | None |"]
    assert text.splitlines() == lines and not text.endswith("\n")


def test_a_bar_inside_a_cell_is_no_border():
    assert table(["a"], [["x|y"]]).splitlines()[-1] == r"| x\|y |"


def test_a_table_replaces_what_stands_between_the_marks_of_a_page(tmp_path):
    page = tmp_path / "page.md"
    write_between_marks(page, "first", "costs")
    page.write_text("before\n" + page.read_text() + "after\n")
    write_between_marks(page, "second", "costs")
    text = page.read_text()
    assert "second" in text and "first" not in text
    assert text.startswith("before\n<!-- costs: begin -->\n") and text.endswith("after\n")
    with pytest.raises(ValueError, match="must have one line <!-- other: begin -->"):
        write_between_marks(page, "third", "other")
