"""docs/GlimpsePrune.ipynb runs, on the playground, as it stands."""

import json
import re

import pytest

from tests.docs.notebook import run_cells
from tests.paths import ROOT

PATH = ROOT / "docs" / "GlimpsePrune.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))


def text_of(cells) -> str:
    return "".join("".join(part.get("text", [])) for cell in cells for part in cell)


@pytest.fixture(scope="module")
def outputs():
    return run_cells(NOTEBOOK)


@pytest.mark.slow
def test_one_image_is_pruned_in_the_decoder_and_in_all_caches(outputs):
    text = text_of(outputs)
    assert re.search(r"^purple \| \d\d? of 576 tokens are left", text, re.M)
    layers, caches = (
        [int(n) for n in re.search(rf"{what}: \[(.+)\]", text)[1].split(",")]
        for what in ("tokens entering each layer", "cache entries of each layer")
    )
    assert layers[0] == 576 > 30 > layers[-1] and len(set(caches)) == 1


@pytest.mark.slow
def test_settings_hold_for_one_call(outputs):
    rows = re.findall(r"^(\w+) +(\d+) of 576 (.*)$", text_of(outputs), re.M)
    kept = {settings: int(count) for _, count, settings in rows}
    assert kept["{'max_remain_ratio': 0.01}"] <= 5 < kept[""] < kept["{'min_remain_num': 100}"]
    assert kept["{'do_selection': False}"] == 576


@pytest.mark.slow
def test_images_have_ratios_of_their_own_and_a_batch_answers_as_one_by_one(outputs):
    text = text_of(outputs)
    ratios = re.findall(r"image \d: (\d+) of 576 tokens", text)
    assert len(ratios) == 2 and all(0 < int(count) < 60 for count in ratios)
    assert "one by one the same: True" in text
    ious = list(map(float, re.findall(r"IoU ([\d.]+)", text)))
    assert len(ious) == 4 and sum(ious) / 4 > 0.7
    pictures = [part for cell in outputs for part in cell if "image/jpeg" in part.get("data", {})]
    assert len(pictures) == 3


def test_stored_outputs_are_small_and_no_error():
    stored = [part for cell in NOTEBOOK["cells"] for part in cell.get("outputs", [])]
    assert PATH.stat().st_size < 200_000
    assert stored and all(part["output_type"] != "error" for part in stored)
