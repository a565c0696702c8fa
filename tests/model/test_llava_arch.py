"""The splice: images in place of their marks."""

import warnings

import pytest
import torch

from llava.constants import IGNORE_INDEX
from llava.model.image_layout import unpad_image, unpad_window
from llava.model.splice import image_slots
from llava.pruning import build_pruner
from tests.conftest import SIDE, pad_batch


def test_images_stand_where_their_marks_were(model, sample):
    prompt = sample(2, "image", 3, "image", 1)
    spliced = model.build_prompt(prompt.ids, images=prompt.images)
    kinds = spliced.visual_index[0].tolist()
    assert kinds == [-1] * 3 + [0] * 36 + [-1] * 3 + [1] * 36 + [-1]
    features = model.encode_images(prompt.images)
    torch.testing.assert_close(spliced.inputs_embeds[0, 3:39], features[0])
    torch.testing.assert_close(spliced.inputs_embeds[0, 42:78], features[1])
    assert spliced.position_ids[0].tolist() == list(range(79))


def test_a_projector_without_weights_leaves_features_as_they_are(make_model, sample):
    images = sample(2, "image").images
    model = make_model(mm_projector_type="identity")
    vision = model.encode_vision(images)
    assert vision.features.shape == (1, 36, model.config.mm_hidden_size)
    (image,) = model.image_tokens(images)
    assert torch.equal(image.embeds, vision.features[0])


def test_an_image_of_one_crop_ends_with_a_newline(make_model, sample):
    model = make_model(image_aspect_ratio="pad", mm_patch_merge_type="spatial_unpad")
    model.model.image_newline = torch.nn.Parameter(torch.randn(32))
    images = sample(2, "image").images
    (image,) = model.image_tokens([images[0]])
    assert torch.equal(image.embeds[-1], model.model.image_newline)
    assert image.length == len(image.embeds) == 37 and image.patches[-1] == -1
    (bare,) = model.image_tokens(images)
    assert torch.equal(image.embeds[:-1], bare.embeds) and bare.length == 36


def test_labels_of_visual_tokens_are_ignored(model, sample):
    prompt = sample(2, "image", 3)
    spliced = model.build_prompt(prompt.ids, labels=prompt.ids.clamp(min=0), images=prompt.images)
    assert (spliced.labels[0, 3:39] == IGNORE_INDEX).all()
    assert spliced.labels[0, 39:].tolist() == prompt.ids[0, 4:].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_on_the_side_the_config_names(make_model, sample, side):
    model = make_model(tokenizer_padding_side=side)
    prompts = [sample(2, "image", 3), sample(9, "image", 8)]
    ids, mask = pad_batch([p.ids for p in prompts], "right")
    spliced = model.build_prompt(ids, mask, images=torch.cat([p.images for p in prompts]))
    padding = ~spliced.attention_mask[0]
    assert padding.sum() == 12
    assert padding[:12].all() if side == "left" else padding[-12:].all()
    assert not spliced.inputs_embeds[0][padding].any()


def test_padding_in_the_middle_is_removed(model, sample):
    prompt = sample(2, "image", 4)
    mask = torch.ones_like(prompt.ids)
    mask[0, 5] = 0
    spliced = model.build_prompt(prompt.ids, mask, images=prompt.images)
    assert spliced.inputs_embeds.shape[1] == prompt.ids.shape[1] - 1 + 35


def test_sequences_are_cut_to_the_length_the_config_names(make_model, sample):
    model = make_model(tokenizer_model_max_length=20)
    prompt = sample(2, "image", 4)
    spliced = model.build_prompt(prompt.ids, labels=prompt.ids, images=prompt.images)
    assert spliced.inputs_embeds.shape[1] == spliced.labels.shape[1] == 20


def test_a_text_only_row_may_use_up_a_dummy_image():
    assert image_slots([1, 0, 2], 3) == [[0], [], [1, 2]]
    assert image_slots([1, 0, 2], 4) == [[0], [], [2, 3]]


@pytest.mark.parametrize("num_images", [0, 1, 4])
def test_images_and_marks_must_match(num_images):
    with pytest.raises(ValueError, match=f"{num_images} images for 2 <image> marks"):
        image_slots([1, 0, 1] if num_images == 4 else [1, 1], num_images)


def test_a_mark_without_images_is_an_error(model, sample):
    prompt = sample(2, "image", 4)
    with pytest.raises(ValueError, match="1 <image> marks"):
        model.generate(prompt.ids, max_new_tokens=2)
    with pytest.raises(ValueError, match="no images were given"):
        model(input_ids=prompt.ids)


def test_a_prompt_may_be_an_image_alone(model, sample):
    prompt = sample("image")
    mark = prompt.ids[:, -1:]
    with torch.no_grad():
        assert model(mark, images=prompt.images).logits.shape[1] == 36


def test_the_tuple_form_leaves_out_what_was_left_out(model, sample):
    prompt = sample(2, "image", 4)
    out = model.prepare_inputs_labels_for_multimodal(
        prompt.ids, None, None, None, None, prompt.images
    )
    assert [x is None for x in out] == [True, True, True, True, False, True]
    out = model.prepare_inputs_labels_for_multimodal(prompt.ids, None, None, None, None, None)
    assert out[0] is prompt.ids and out[4] is None


@pytest.mark.parametrize("name", ["none", "vispruner", "fastv", "nuwa", "restore+vispruner"])
def test_embeddings_alone_do_what_the_model_does_or_say_that_they_do_not(model, sample, name):
    prompt = sample(2, "image", 4)
    model.pruner = build_pruner(name, **({} if name == "none" else {"visual_token_num": 10}))
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _, places, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
            prompt.ids, None, None, None, None, prompt.images
        )
        got = model(inputs_embeds=embeds, attention_mask=mask, position_ids=places).logits
        wanted = model(prompt.ids, images=prompt.images).logits
    assert (places is None) == (model.position_policy == "sequence")
    if told := [str(one.message) for one in said]:
        assert len(told) == 1 and "acts inside the decoder" in told[0]
    else:
        torch.testing.assert_close(got, wanted)
    assert bool(told) == (name in ("fastv", "nuwa", "restore+vispruner"))


def test_images_may_be_a_tuple(model, sample):
    prompt = sample(2, "image", 1, "image", 4)
    listed, others = (
        model.build_prompt(prompt.ids, images=kind(prompt.images)) for kind in (list, tuple)
    )
    assert torch.equal(listed.inputs_embeds, others.inputs_embeds)


def test_anyres_rows_end_with_a_newline_and_padding_is_cut(anyres_model, sample):
    model = anyres_model
    prompt = sample(2, "image", 4)
    crops = torch.randn(3, 3, SIDE, SIDE)
    spliced = model.build_prompt(prompt.ids, images=[crops], image_sizes=[(2 * SIDE, 60)])
    top, bottom, left, right = unpad_window(6, 12, (2 * SIDE, 60))
    rows, columns = bottom - top, right - left
    assert rows < 6 and columns == 12
    visual = spliced.visual_index[0] == 0
    assert visual.sum() == 36 + rows * (columns + 1)
    newline = model.model.image_newline
    patches = spliced.patch_index[0][visual][36:].view(rows, columns + 1)
    assert (patches[:, -1] == -1).all()
    embeds = spliced.inputs_embeds[0][visual][36:].view(rows, columns + 1, -1)
    torch.testing.assert_close(embeds[:, -1], newline.expand(rows, -1))
    # Rows run across tiles: the first six patches are of tile 1, the next six of tile 2.
    assert (patches[0, :12] // 36).tolist() == [1] * 6 + [2] * 6


def test_crops_that_do_not_fit_the_image_size_are_an_error(anyres_model, sample):
    prompt = sample(2, "image", 4)
    with pytest.raises(ValueError, match="process_images"):
        anyres_model.build_prompt(
            prompt.ids, images=[torch.randn(4, 3, SIDE, SIDE)], image_sizes=[(2 * SIDE, SIDE)]
        )
    with pytest.raises(ValueError, match="image_sizes"):
        anyres_model.build_prompt(prompt.ids, images=[torch.randn(3, 3, SIDE, SIDE)])


@pytest.mark.parametrize("count", [1, 3])
def test_every_image_has_a_size(anyres_model, sample, count):
    prompt = sample(2, "image", 4, "image")
    images = [torch.randn(3, 3, SIDE, SIDE)] * 2
    with pytest.raises(ValueError, match=f"{count} image_sizes for 2 images"):
        anyres_model.build_prompt(prompt.ids, images=images, image_sizes=[(42, 84)] * count)


@pytest.mark.parametrize("height, width", [(70, 70), (98, 98), (85, 85), (84, 70), (70, 84)])
def test_crops_of_another_size_than_the_towers_are_an_error(model, sample, height, width):
    model.pruner = build_pruner("downsample", visual_token_num=9)  # makes those of the tower small
    assert model.encode_images(torch.randn(1, 3, SIDE, SIDE)).shape[1] == 9
    with pytest.raises(ValueError, match=rf"\(3, 84, 84\).* not \(3, {height}, {width}\)"):
        model.encode_images(torch.randn(1, 3, height, width))


def test_unpadding_removes_the_border_the_resize_added():
    grid = torch.arange(48).view(1, 6, 8)
    assert torch.equal(unpad_image(grid, (8, 4)), grid[:, 1:5])
    assert torch.equal(unpad_image(grid, (3, 6)), grid[:, :, 2:6])
