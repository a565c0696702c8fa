"""Which patches of an image a box covers, wherever its crops lie."""

import numpy as np
import pytest
import torch

from llava.image_settings import ImageSettings
from llava.pruning import build_pruner, trace_pruning
from llava.pruning.base import DecoderPruner
from llava.pruning.frames import covered, crop_frames, shares_of
from llava.pruning.picture import surviving_patches, survivors
from tests.conftest import pad_batch
from tests.golden_data import golden_json

CASES = golden_json("glimpseprune-qwen/utils.json")["box_to_mask"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["grid_hw"]))
def test_boxes_in_pixels_cover_the_recorded_cells(case):
    grid = tuple(case["grid_hw"])
    frame = (0, 0, 64, 64)  # a power of two: shares come back unchanged
    boxes = (64 * np.array(case["normed_bboxes"])).tolist()
    cells = covered(boxes, [frame], grid)
    assert cells.shape == (1, *grid)
    assert cells.flatten().nonzero()[:, 0].tolist() == case["on"]


def test_boxes_follow_an_image_that_is_padded_or_cut():
    (padded,) = crop_frames((80, 41), ImageSettings("pad"), 40)
    assert padded == (0, -19, 80, 80)  # as many rows above as the preprocessing puts there
    (cut,) = crop_frames((80, 40), ImageSettings(None), 40)
    assert cut == (20, 0, 40, 40)
    assert shares_of([[0, 0, 10, 40], [30, 10, 90, 20]], cut) == [[0.25, 0.25, 1.0, 0.5]]
    assert not covered([[0, 0, 10, 40]], [cut], (4, 4)).any()


def test_a_tile_shows_its_part_of_a_box():
    settings = ImageSettings("anyres", image_grid_pinpoints=((80, 40),))
    frames = crop_frames((160, 80), settings, 40)
    cells = covered([[100, 0, 119, 79]], frames, (2, 4))
    assert cells[0].tolist() == [[False, False, True, False]] * 2
    assert cells[2].tolist() == [[False, True, False, False]] * 2


def test_survivors_of_a_batch_are_those_of_its_prompts_alone(model, sample):
    first, second = sample(3, "image", 2, "image", 2), sample(7, "image", 4, seed=1)
    options = {"max_new_tokens": 1, "do_sample": False}
    for pruner in (DecoderPruner(visual_token_num=5, layer=2), build_pruner("none")):
        model.pruner = pruner
        alone = []
        for prompt in (first, second):
            with trace_pruning(model) as trace:
                model.generate(prompt.ids, images=prompt.images, **options)
            alone.append(surviving_patches(trace, prompt.ids[0]))
        ids, mask = pad_batch([first.ids, second.ids])
        with trace_pruning(model) as trace:
            images = torch.cat([first.images, second.images])
            model.generate(ids, attention_mask=mask, images=images, num_beams=2, **options)
        together = survivors(trace, [first.ids[0], second.ids[0]])
        assert [[p.tolist() for p in row] for row in together] == [
            [p.tolist() for p in row] for row in alone
        ]
