"""images/kept_patches.png is what README's command makes, and shows a right answer."""

import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from llava.eval import run_llava
from llava.mm_utils import load_image
from llava.model_args import load_front_end
from llava.playground import default_image
from llava.pruning.picture import GAP, OUTLINE, PANEL_SIDE
from tests.paths import ROOT

SIDE = 24  # patches of the playground's tower
#: difference of attention, as a share, that no kind of processor turns around
CLEAR = 0.02


def kept_in(picture: Image.Image) -> set[int]:
    """The patches that a picture shows as kept: those with an outline."""
    pixels, cell = np.asarray(picture.convert("RGB")), PANEL_SIDE / SIDE
    corners = [round(place * cell) + GAP for place in range(SIDE)]
    found = {
        row * SIDE + column
        for row, top in enumerate(corners)
        for column, left in enumerate(corners)
        if (pixels[top, left + 5] == OUTLINE).all() and (pixels[top + 5, left] == OUTLINE).all()
    }
    return found


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    """(answer, picture) of README's command, in full precision."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^python -m llava\.eval\.run_llava (.*kept_patches\.png)$", text, re.M)
    path = tmp_path_factory.mktemp("kept") / "kept_patches.png"
    arguments = shlex.split(command.replace("kept_patches.png", f"{path} --dtype float32"))
    answer = run_llava.answer(run_llava.build_parser().parse_args(arguments))
    return answer, Image.open(path)


def clearly_important() -> set[int]:
    """The patches that VisPruner keeps for their attention, on every kind of processor."""
    args = run_llava.build_parser().parse_args(["--dtype", "float32"])
    front = load_front_end(args)
    pixels = front.picture(load_image(default_image())).pixels[None]
    with torch.inference_mode():
        vision = front.model.get_vision_tower().tokens(pixels, frozenset({"cls_attention"}))
    attention, order = vision.cls_attention.mean(dim=1)[0].sort(descending=True)
    half = 64 // 2
    clear = attention[:half] > attention[half] * (1 + CLEAR)
    return set(order[:half][clear].tolist())


ASKED = {"What color is the ring?": "red", "Is there a red ring": "Yes", "Which is higher": "ring"}


@pytest.mark.slow
def test_the_questions_of_the_readme_are_answered_rightly():
    page = (ROOT / "README.md").read_text()
    for beginning, right in ASKED.items():
        (question,) = set(re.findall(rf"`({re.escape(beginning)}[^`]*)`", page))
        query = f"{question}\nAnswer the question using a single word or phrase."
        for budget in ([], ["--pruning-method", "vispruner", "--visual-token-num", "64"]):
            arguments = ["--query", query, "--temperature", "0", *budget]
            assert run_llava.answer(run_llava.build_parser().parse_args(arguments)) == right


def test_the_command_answers_rightly(again):
    assert again[0] == "red"


def test_the_picture_shows_what_the_command_keeps(again):
    # The diverse half depends on the last bits of the features: only its size can be compared.
    _, made = again
    important = clearly_important()
    with Image.open(ROOT / "images/kept_patches.png") as stored:
        assert stored.size == made.size  # as many lines of text
        shown = kept_in(stored)
        caption = np.asarray(stored.convert("L"), dtype=int)[PANEL_SIDE + 2 * GAP :]
    assert len(shown) == len(kept_in(made)) == 64
    assert len(important) > 24
    assert important <= shown and important <= kept_in(made)
    written = np.asarray(made.convert("L"), dtype=int)[PANEL_SIDE + 2 * GAP :]
    assert (abs(caption - written) > 128).mean() < 0.005  # the same question and answer
