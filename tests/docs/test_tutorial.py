"""docs/Tutorial.ipynb runs, on the playground, as it stands."""

import json
import re

import pytest

from llava.pruning import build_pruner
from tests.docs.notebook import run_cells
from tests.paths import ROOT

PATH = ROOT / "docs" / "Tutorial.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def outputs():
    return run_cells(NOTEBOOK)


def printed(outputs) -> str:
    return "".join("".join(part.get("text", [])) for cell in outputs for part in cell)


@pytest.mark.slow
def test_the_cells_prune_and_show_it(outputs):
    text = printed(outputs)
    counts = [int(count) for count in re.findall(r"\| (\d+) visual tokens", text)]
    assert counts[1] == 64 < counts[0]
    layers = [int(n) for n in re.search(r"each layer: \[(.+)\]", text)[1].split(",")]
    assert layers[0] == counts[0] and layers[-1] == 64
    pictures = [part for cell in outputs for part in cell if "image/jpeg" in part.get("data", {})]
    assert len(pictures) == 3


@pytest.mark.slow
def test_the_cells_compare_methods(outputs):
    right = re.findall(r"^(\w+) +(\d+) of (\d+) right$", printed(outputs), re.M)
    assert [name for name, *_ in right] == ["none", "random", "vispruner"]
    assert all(0 <= int(count) <= int(total) for _, count, total in right)


@pytest.mark.slow
def test_the_cells_measure_what_is_saved(outputs):
    row = r"^(\w+) +(\d*) +(\d+) +([\d.]+) +(\d+)$"
    table = {m[1]: (float(m[4]), float(m[5])) for m in re.finditer(row, printed(outputs), re.M)}
    (dense_flops, dense_cache), (flops, cache) = table["none"], table["vispruner"]
    assert flops < dense_flops / 2 and cache < dense_cache / 2


@pytest.mark.slow
def test_the_stored_operations_are_those_of_the_question_asked_now(outputs):
    stored = [cell["outputs"] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    row = r"^(\w+) +(?:\d* +)?\d+ +([\d.]+) +\d+$"  # times and the bytes of a number differ
    measured, kept = (re.findall(row, printed(found), re.M) for found in (outputs, stored))
    assert len(kept) == 3 and kept == measured


def test_stored_outputs_are_small_and_no_error():
    stored = [part for cell in NOTEBOOK["cells"] for part in cell.get("outputs", [])]
    assert PATH.stat().st_size < 200_000
    assert all(part["output_type"] != "error" for part in stored)


def test_the_stored_method_is_printed_as_it_is_now():
    stored = [cell["outputs"] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert f"{build_pruner('vispruner', visual_token_num=64)}\n" in printed(stored)
