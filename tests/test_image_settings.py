"""How images are cut is a value of the model; its config stays as the checkpoint has it."""

import copy
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from llava.image_settings import ImageSettings
from llava.mm_utils import process_images
from llava.model.language_model.llava_llama import LlavaConfig
from llava.model.language_model.llava_mistral import LlavaMistralConfig
from llava.pruning import METHODS, Pruner, VisionStage, build_pruner
from tests.conftest import ANYRES, PINPOINTS, SIDE, make_pruner

PLAIN = ImageSettings("anyres", tuple(map(tuple, PINPOINTS)), "area", "spatial_unpad")
#: methods that want LLaVA-NeXT's images cut or laid out in another way
CHANGING = sorted(
    name
    for name, method in METHODS.items()
    if issubclass(method, VisionStage)
    and (
        method.anyres_tiles
        or any(getattr(PLAIN, key) != own for key, own in method.anyres_config.items())
    )
)


@pytest.fixture
def processor():
    side = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessor(crop_size=side, size={"shortest_edge": SIDE})


@pytest.fixture
def small_wide_image():
    """Either canvas of `PINPOINTS` shows all of it, so the first one is taken, a narrow one."""
    return Image.linear_gradient("L").resize((SIDE, SIDE // 2)).convert("RGB")


@pytest.mark.parametrize("name", CHANGING)
def test_a_method_changes_the_settings_and_no_value_of_the_config(anyres_model, name):
    model = anyres_model
    before = copy.deepcopy(vars(model.config)), model.config.to_json_string()
    assert model.image_settings == PLAIN
    model.pruner = make_pruner(name, 50)
    assert model.image_settings != PLAIN
    assert (vars(model.config), model.config.to_json_string()) == before
    model.pruner = build_pruner("none")
    assert model.image_settings == PLAIN


def test_the_settings_say_what_a_method_asks_for(anyres_model):
    anyres_model.pruner = build_pruner("random", visual_token_num=50)
    assert anyres_model.image_settings == ImageSettings(
        "anyres", ((2 * SIDE, 2 * SIDE),), "area", "spatial"
    )
    anyres_model.pruner = build_pruner("fastervlm", visual_token_num=50)
    wanted = ImageSettings("anyres", PLAIN.image_grid_pinpoints, "fill", "spatial")
    assert anyres_model.image_settings == wanted


def test_images_of_one_crop_are_cut_the_same_for_every_method(model):
    plain = model.image_settings
    model.pruner = build_pruner("random", visual_token_num=10)
    assert model.image_settings == plain and plain.image_aspect_ratio == "pad"


@pytest.mark.parametrize("name", ["none", *CHANGING])
def test_the_config_of_a_model_gives_the_same_pixels(
    anyres_model, processor, small_wide_image, name
):
    anyres_model.pruner = make_pruner(name, 50)
    wanted = process_images([small_wide_image], processor, anyres_model.image_settings)
    config = anyres_model.config
    copies = [config, copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))]
    for given in copies:
        assert torch.equal(process_images([small_wide_image], processor, given), wanted)


def test_a_canvas_of_as_many_tiles_is_the_one_the_method_chose(
    anyres_model, processor, small_wide_image, sample
):
    model = anyres_model
    plain = process_images([small_wide_image], processor, model.config)
    model.pruner = build_pruner("fastervlm", visual_token_num=50)
    pixels = process_images([small_wide_image], processor, model.config)
    assert pixels.shape == plain.shape and not torch.equal(pixels, plain)


def test_a_changed_copy_of_the_config_is_followed(anyres_model, processor, small_wide_image):
    anyres_model.pruner = build_pruner("random", visual_token_num=50)
    padded = copy.copy(anyres_model.config)
    padded.image_aspect_ratio = "pad"
    assert ImageSettings.of(padded).image_aspect_ratio == "pad"
    assert process_images([small_wide_image], processor, padded).shape == (1, 3, SIDE, SIDE)


def test_pixels_of_other_settings_are_refused(anyres_model, processor, small_wide_image, sample):
    pixels = process_images([small_wide_image], processor, anyres_model.image_settings)
    anyres_model.pruner = build_pruner("random", visual_token_num=50)
    with pytest.raises(ValueError, match="3 crops, .* cuts .* process_images.*image_settings"):
        anyres_model(sample(4, "image", 5).ids, images=pixels, image_sizes=[small_wide_image.size])


@pytest.mark.parametrize("name", CHANGING)
def test_a_saved_model_has_the_settings_of_its_checkpoint(anyres_model, tmp_path, name):
    anyres_model.pruner = make_pruner(name, 50)
    anyres_model.save_pretrained(tmp_path / "model")
    anyres_model.config.save_pretrained(tmp_path / "config")
    for folder in ("model", "config"):
        saved = json.loads((tmp_path / folder / "config.json").read_text())
        assert saved["image_grid_pinpoints"] == PINPOINTS
        assert saved["mm_patch_merge_type"] == "spatial_unpad"
        assert not {"image_changes", "anyres_selection"} & set(saved)


@pytest.mark.parametrize("kind", [LlavaConfig, LlavaMistralConfig])
def test_a_config_file_cannot_bring_changes_of_its_own(kind):
    config = kind(image_aspect_ratio="anyres", image_changes={"image_grid_pinpoints": ((1, 1),)})
    assert config.image_changes == {}


def test_resolutions_may_be_text():
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints="[(84, 168)]")
    assert ImageSettings.of(config).image_grid_pinpoints == ((84, 168),)


def test_tiles_without_resolutions_are_an_error(processor, small_wide_image):
    config = SimpleNamespace(image_aspect_ratio="anyres")
    with pytest.raises(ValueError, match="anyres needs image_grid_pinpoints"):
        process_images([small_wide_image], processor, config)


def test_a_method_may_set_nothing_but_settings(anyres_model):
    class Odd(VisionStage, Pruner):
        name, anyres_config = "odd", {"image_size": 7}

    with pytest.raises(ValueError, match="odd sets image_size in anyres_config, choose"):
        anyres_model.pruner = Odd()


@pytest.mark.parametrize("merge", ["flat", "spatial"])
def test_a_newline_that_the_model_does_not_have_is_missed_when_it_is_assigned(make_model, merge):
    class Unpadded(VisionStage, Pruner):
        name, anyres_config = "unpadded", {"mm_patch_merge_type": "spatial_unpad"}

    tiled = make_model(**{**ANYRES, "mm_patch_merge_type": merge})
    before = tiled.pruner
    with pytest.raises(ValueError, match=f"unpadded needs the newline .* with '{merge}', without"):
        tiled.pruner = Unpadded()
    assert tiled.pruner is before and tiled.image_settings.mm_patch_merge_type == merge
    make_model(mm_patch_merge_type=merge).pruner = Unpadded()  # one crop has no rows to end


def test_two_models_with_one_config_each_keep_the_settings_of_their_method(anyres_model):
    other = type(anyres_model)(anyres_model.config)
    assert other.config is anyres_model.config
    other.pruner = build_pruner("vispruner", visual_token_num=50)
    tiled = other.image_settings
    anyres_model.pruner = build_pruner("none")
    assert other.image_settings == tiled != anyres_model.image_settings


@pytest.mark.parametrize(
    "values, says",
    [
        ({"image_aspect_ratio": "anyres_max_9"}, "'anyres_max_9' is not supported, choose square"),
        ({"image_aspect_ratio": "highres"}, "'highres' is not supported"),
        (
            {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "(1x1),...,(6x6)"},
            "image_grid_pinpoints must be a list of .* not '\\(1x1\\),...,\\(6x6\\)'",
        ),
    ],
)
def test_settings_of_later_versions_are_refused(processor, small_wide_image, values, says):
    """They cut the middle out in silence, or ended in a SyntaxError."""
    with pytest.raises(ValueError, match=says):
        process_images([small_wide_image], processor, SimpleNamespace(**values))


def test_unknown_words_cut_the_middle_out(processor, small_wide_image):
    middle, other = (
        process_images([small_wide_image], processor, SimpleNamespace(image_aspect_ratio=ratio))
        for ratio in (None, "anything")
    )
    assert torch.equal(middle, other)
