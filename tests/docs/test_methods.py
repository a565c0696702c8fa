"""docs/Methods.md says of every method what the code says."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass

import pytest

from llava.pruning import METHODS, DecoderStage, VisionStage
from llava.pruning.about import is_trained
from llava.pruning.choice import BUDGETS
from llava.pruning.cues import check_cues
from llava.pruning.stages import fills
from llava.pruning.testing.tiny import make_own_grids_model
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "Methods.md").read_text(encoding="utf-8")
COLUMNS = ("method", "where it acts", "what its budget counts", "families", "needs text?")
COLUMNS += ("trained?", "paper", "file", "differences from the release")


def table() -> dict[str, dict[str, str]]:
    """Method -> its row, from the one table that has these columns."""
    head = "| " + " | ".join(COLUMNS) + " |\n"
    assert PAGE.count(head) == 1, "the table has other columns"
    lines = PAGE.split(head)[1].split("\n\n")[0].splitlines()[1:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert all(len(row) == len(COLUMNS) for row in rows), "a row has another number of cells"
    return {row[0].strip("`"): dict(zip(COLUMNS, row, strict=True)) for row in rows}


def section(name: str) -> str:
    found = re.search(rf"^### {re.escape(name)}\n(.*?)(?=^### |\Z)", PAGE, re.S | re.M)
    assert found, f"no section on {name}"
    return found[1]


def test_the_notice_credits_the_paper_of_every_method():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    papers = {name: re.search(r"\d{4}\.\d{5}", row["paper"]) for name, row in table().items()}
    assert [name for name, found in papers.items() if found and found[0] not in notice] == []
    assert sum(map(bool, papers.values())) > len(papers) / 2


def test_the_table_has_every_method_once_and_in_order():
    assert list(table()) == list(METHODS.own)


@pytest.mark.parametrize("name", METHODS.own)
def test_every_cell_is_filled_and_the_file_is_the_method_s_own(name):
    row = table()[name]
    assert all(row.values())
    files = re.findall(r"[a-z0-9_]+\.py", row["file"])
    module = METHODS[name].__module__.rsplit(".", 1)[1]
    assert f"{module}.py" in files
    assert all((ROOT / "llava" / "pruning" / file).exists() for file in files)


@pytest.mark.parametrize("name", METHODS.own)
def test_text_and_training_are_what_the_class_says(name):
    method, row = METHODS[name], table()[name]
    reads = getattr(method, "reads_text", False) or getattr(method, "reads_question", False)
    assert row["needs text?"].startswith("yes" if reads else "no"), "needs text?"
    assert row["trained?"].startswith("yes" if is_trained(method) else "no"), "trained?"


@pytest.mark.parametrize("name", METHODS.own)
def test_families_are_those_whose_tower_has_what_the_method_needs(name):
    try:
        check_cues(METHODS[name]().vision, make_own_grids_model().visual)
    except ValueError:
        assert table()[name]["families"] == "LLaVA"
    else:
        assert table()[name]["families"] == "all"


@pytest.mark.parametrize("name", METHODS.own)
def test_where_a_method_acts_is_where_it_has_hooks(name):
    method, where = METHODS[name], table()[name]["where it acts"]
    in_decoder = issubclass(method, DecoderStage)
    assert bool(re.search(r"decoder layer|decoder layers", where)) == in_decoder
    if not issubclass(method, VisionStage):
        return
    if fills(method, VisionStage, "before_tower_layer"):
        assert "inside the vision tower" in where
    if fills(method, VisionStage, "before_tower"):
        assert "before the vision tower" in where


@pytest.mark.parametrize("name", METHODS.own)
def test_a_method_s_section_names_all_its_options(name):
    text, method = section(name), METHODS[name]
    options = [f.name for f in fields(method) if f.init] if is_dataclass(method) else []
    missing = [option for option in options if f"`{option}`" not in text]
    assert not [o for o in missing if o not in BUDGETS], "options without a word on them"


@pytest.mark.parametrize("name", METHODS.own)
def test_defaults_in_the_option_tables_are_those_of_the_code(name):
    method = METHODS[name]
    if not is_dataclass(method):
        return
    defaults = {f.name: f.default for f in fields(method) if f.init}
    for option, value in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section(name), re.M):
        assert option in defaults, f"{option} is no option"
        assert value.strip().strip('"') == str(defaults[option]), option
