"""Markdown tables, as every report writes them."""

from llava.eval.markdown import table


def test_the_last_alignment_holds_for_the_columns_behind_it():
    text = table(["a", "b", "c"], [["x", 1, 2.5], ["y", "", None]], "lr")
    lines = ["| a | b | c |", "| --- | ---: | ---: |", "| x | 1 | 2.5 |", "| y |  | None |"]
    assert text.splitlines() == lines and not text.endswith("\n")


def test_a_bar_inside_a_cell_is_no_border():
    assert table(["a"], [["x|y"]]).splitlines()[-1] == r"| x\|y |"
