"""Pictures for Qwen2.5-VL: sizes, patches, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from llava.model.multimodal_encoder.qwen2_5_vl_images import (
    Qwen2_5_VLImageProcessor,
    smart_resize,
    split_images,
)


@pytest.mark.parametrize(
    "size, options, expected",
    [
        ((336, 336), {}, (336, 336)),
        ((360, 640), {}, (364, 644)),
        ((42, 70), {}, (56, 56)),  # 1.5 and 2.5 blocks: halves go to the even number
        ((28, 28), {}, (56, 56)),  # four tokens at least
        ((500, 1200), {"max_pixels": 156800}, (252, 588)),
        ((336, 336), {"min_pixels": 200704}, (448, 448)),
        ((30, 6000), {"max_pixels": 28 * 28 * 20}, (28, 1764)),  # never less than a block
    ],
    ids=str,
)
def test_sizes_are_whole_blocks_within_the_bounds(size, options, expected):
    assert smart_resize(*size, **options) == expected


@pytest.mark.parametrize(
    "size, says", [((27, 400), "400 x 27 pixels is too small"), ((30, 6001), "6001 x 30.*too thin")]
)
def test_pictures_without_proportions_are_refused(size, says):
    with pytest.raises(ValueError, match=says):
        smart_resize(*size)


def test_patches_stand_in_blocks_row_by_row():
    """Every patch has a level of its own: its number in reading order."""
    rows, columns = 4, 6
    level = np.arange(rows * columns).reshape(rows, columns).repeat(14, 0).repeat(14, 1)
    picture = Image.fromarray(np.stack([level, 100 + level, 200 + level], 2).astype(np.uint8))
    processor = Qwen2_5_VLImageProcessor(image_mean=(0, 0, 0), image_std=(1, 1, 1))
    tensor = processor.process_images([picture])[0]
    assert tensor.shape == (2, 3, 4, 1176) and tensor.dtype == torch.float32
    levels = (tensor.unflatten(-1, (3, 2, 14, 14)) * 255).round().long()
    for channel in range(3):
        assert (levels[..., channel, :, :, :].flatten(3).float().std(-1) == 0).all()
    first = levels[..., 0, 0, 0, 0]
    assert first[0, 0].tolist() == [0, 1, 6, 7] and first[0, 1].tolist() == [2, 3, 8, 9]
    assert first[1, 2].tolist() == [16, 17, 22, 23]
    assert torch.equal(levels[..., 2, 1, 5, 5], first + 200)


def test_values_are_normalised_per_channel():
    processor = Qwen2_5_VLImageProcessor()
    tensor = processor.process_images([Image.new("RGB", (56, 56), (0, 128, 255))])[0]
    for channel, level in enumerate((0, 128, 255)):
        value = (level / 255 - processor.image_mean[channel]) / processor.image_std[channel]
        own = tensor.unflatten(-1, (3, -1))[..., channel, :]
        torch.testing.assert_close(own, torch.full_like(own, value))


def test_transparent_parts_become_white():
    clear = Image.new("RGBA", (56, 56), (255, 0, 0, 0))
    white = Image.new("RGB", (56, 56), (255, 255, 255))
    processor = Qwen2_5_VLImageProcessor()
    assert torch.equal(*processor.process_images([clear, white]))


def test_the_form_of_transformers_and_back():
    processor = Qwen2_5_VLImageProcessor(max_pixels=28 * 28 * 30)
    pictures = [Image.new("RGB", size, "teal") for size in ((200, 100), (90, 320))]
    own, batch = processor.process_images(pictures), processor(pictures)
    assert batch["image_grid_thw"].tolist() == [[1, 8, 14], [1, 20, 4]]
    assert batch["pixel_values"].shape == (8 * 14 + 20 * 4, 1176)
    parts = processor.split(batch["pixel_values"], batch["image_grid_thw"])
    assert all(map(torch.equal, parts, own))
    assert processor(pictures[0])["image_grid_thw"].tolist() == [[1, 8, 14]]
    with pytest.raises(ValueError, match="is about 112 patches"):
        split_images(batch["pixel_values"], batch["image_grid_thw"][:1])


def test_bounds_of_one_call_leave_the_settings_as_they_are():
    processor, picture = Qwen2_5_VLImageProcessor(), Image.new("RGB", (280, 280))
    small, large = ({"max_pixels": 4 * 784}, {"min_pixels": 400 * 784})
    grids = [
        call(picture, **bounds)["image_grid_thw"].tolist()
        for call in (processor, processor.preprocess)
        for bounds in ({}, small, large, {})
    ]
    assert grids == [[[1, n, n]] for n in (20, 4, 40, 20)] * 2
    with pytest.raises(ValueError, match="min_pixels 3136 and max_pixels 100 leave no size"):
        processor(picture, max_pixels=100)


def test_lists_of_nothing_are_nothing():
    """As helpers give them for messages without pictures, or without videos."""
    processor, picture = Qwen2_5_VLImageProcessor(), Image.new("RGB", (56, 56))
    assert list(processor(images=[], videos=[])) == []
    assert list(processor(images=[picture], videos=[])) == ["pixel_values", "image_grid_thw"]


def test_texts_are_told_where_they_go():
    with pytest.raises(ValueError, match="text is not taken here.*FrontEnd.*<|image_pad|>"):
        Qwen2_5_VLImageProcessor()(text=["Where?"], images=[Image.new("RGB", (56, 56))])


def test_other_things_than_pictures_are_refused():
    processor, frame = Qwen2_5_VLImageProcessor(), Image.new("RGB", (56, 56))
    with pytest.raises(ValueError, match="must be a PIL image, not list: videos go to process_"):
        processor.process_images([[frame, frame]])
    with pytest.raises(ValueError, match="must be a PIL image, not str"):
        processor.process_images(["picture.png"])
    with pytest.raises(ValueError, match="2 pairs of frames: videos come as pixel_values_videos"):
        split_images(torch.ones(8, 1176), torch.tensor([[2, 2, 2]]))


@pytest.mark.parametrize(
    ("grids", "says"),
    [
        ([[1, 3, 4]], r"holds \[1, 3, 4\]: rows and columns of patches must be multiples of 2"),
        ([[1, 0, 4]], "must be multiples of 2"),
        ([1, 4, 4], r"must be \(images or videos, 3\), not \(3,\)"),
        ([[1, 4, 4]], "do not fit image_grid_thw"),
    ],
)
def test_grids_that_cannot_be_are_refused(grids, says):
    for given in (grids, torch.tensor(grids)):
        with pytest.raises(ValueError, match=says):
            split_images(torch.ones(12, 1176), given)
