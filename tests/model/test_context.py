"""How long a prompt and its answer may be: never cut in silence, an error beyond the positions."""

import warnings

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, GenerationConfig

from llava.mm_utils import tokenizer_image_token
from llava.model.context import PromptTooLong, answer_room, position_limit
from llava.pruning import build_pruner
from tests.conftest import pad_batch
from tests.golden_data import GOLDEN

PATCHES = 36  # of an image of the tiny model


def text_of(length: int) -> torch.Tensor:
    return torch.full((1, length), 5)


def caught(action) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in found if "positions" in str(warning.message)]


def test_a_prompt_longer_than_in_training_is_answered_whole_with_one_warning(make_model, sample):
    model = make_model(tokenizer_model_max_length=40)
    prompt = sample(2, "image", 9)
    options = {"images": prompt.images, "max_new_tokens": 2, "do_sample": False}
    said = caught(lambda: [model.generate(prompt.ids, **options) for _ in range(3)])
    assert len(said) == 1
    assert "48 positions" in said[0] and "40 (tokenizer_model_max_length)" in said[0]
    free = make_model(tokenizer_model_max_length=None)
    free.load_state_dict(model.state_dict())
    assert torch.equal(model.generate(prompt.ids, **options), free.generate(prompt.ids, **options))
    assert model.build_prompt(prompt.ids, images=prompt.images).inputs_embeds.shape[1] == 48


def test_text_alone_is_not_cut_either(make_model):
    model = make_model(tokenizer_model_max_length=20, max_position_embeddings=50)
    (said,) = caught(lambda: model.generate(text_of(30), max_new_tokens=1, do_sample=False))
    assert "30 positions" in said
    with pytest.raises(PromptTooLong, match="the prompt takes 51 positions, .* has 50 "):
        model.generate(text_of(51), max_new_tokens=1)


def test_a_prompt_beyond_the_positions_is_an_error_with_both_numbers(make_model, sample):
    model = make_model(max_position_embeddings=60)
    fits, long = sample(2, "image", 9), sample(2, "image", 9, "image", 1)
    model.generate(fits.ids, images=fits.images, max_new_tokens=1, do_sample=False)
    message = "takes 85 positions, and the model has 60 .max_position_embeddings"
    with pytest.raises(ValueError, match=message):
        model.generate(long.ids, images=long.images, max_new_tokens=1)
    with pytest.raises(ValueError, match=message):
        model(input_ids=long.ids, images=long.images)
    ids, mask = pad_batch([fits.ids, long.ids], "left")
    images = torch.cat([fits.images, long.images])
    with pytest.raises(ValueError, match="prompt 2 of 2 takes 85"):
        model.generate(ids, attention_mask=mask, images=images, max_new_tokens=1)


def test_a_prompt_that_pruning_makes_short_enough_is_answered(make_model, sample):
    model = make_model(max_position_embeddings=60)
    prompt = sample(2, "image", 9, "image", 1)
    model.pruner = build_pruner("random", visual_token_num=8)
    out = model.generate(prompt.ids, images=prompt.images, max_new_tokens=2, do_sample=False)
    assert out.shape[1] == 2
    model.pruner = build_pruner("fastv", visual_token_num=8)  # prunes inside the decoder
    with pytest.raises(PromptTooLong, match="takes 85"):
        model.generate(prompt.ids, images=prompt.images, max_new_tokens=2)


def test_a_method_that_keeps_the_places_of_the_image_needs_them_all(make_model, sample):
    model = make_model(max_position_embeddings=60)
    prompt = sample(2, "image", 9, "image", 1)
    model.pruner = build_pruner("random", visual_token_num=8)
    model.pruner.position_policy = "grid"
    with pytest.raises(PromptTooLong, match="takes 85"):
        model.generate(prompt.ids, images=prompt.images, max_new_tokens=2)


def test_an_answer_ends_with_the_positions_and_says_so_once(make_model):
    model = make_model(max_position_embeddings=50)
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": -1}
    sizes = []
    said = caught(
        lambda: sizes.extend(model.generate(text_of(n), **options).shape[1] for n in (40, 50, 10))
    )
    assert sizes == [11, 1, 30]  # nothing is computed from the last token of an answer
    assert len(said) == 1
    assert "up to 30 tokens" in said[0] and "40 positions it ends after 11" in said[0]


@pytest.mark.parametrize("given", ["keyword", "config"])
def test_a_length_of_prompt_and_answer_ends_with_the_positions_too(make_model, given):
    model = make_model(max_position_embeddings=50)
    options = {"max_length": 41, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    if given == "config":
        options = {"generation_config": GenerationConfig(**options)}
    sizes = []
    said = caught(lambda: sizes.append(model.generate(text_of(46), **options).shape[1]))
    assert sizes == [5] and "46 positions it ends after 5" in said[0]


def test_the_tokenizer_does_not_warn_of_its_own_count(caplog):
    folder = GOLDEN / "tiny-llava-v1.5"
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False, model_max_length=20)
    tokenizer_image_token("<image> " + "word " * 50, tokenizer)
    assert not caplog.records


def test_scaled_positions_count(make_model):
    config = make_model(max_position_embeddings=50).config
    assert position_limit(config) == 50
    config.rope_scaling = {"type": "linear", "factor": 4.0}
    assert position_limit(config) == 200
    config.max_position_embeddings = None
    assert position_limit(config) is None


def test_what_is_not_known_limits_nothing(model):
    assert answer_room(model, None, 10**6) == 10**6
    assert answer_room(model, 10, None) is None


@pytest.mark.parametrize("rule", ["labels", "training mode", "asked for"])
def test_training_cuts_and_takes_dummies(make_model, sample, rule):
    model = make_model(tokenizer_model_max_length=20, max_position_embeddings=30)
    prompt = sample(2, "image", 4)
    model.train(rule == "training mode")
    model.as_in_training = True if rule == "asked for" else None
    labels = prompt.ids if rule == "labels" else None
    spliced = model.build_prompt(prompt.ids, labels=labels, images=prompt.images)
    assert spliced.inputs_embeds.shape[1] == 20
    text = text_of(9)
    labels = text if rule == "labels" else None
    assert model.build_prompt(text, labels=labels, images=prompt.images).inputs_embeds.shape[1] == 9


def test_an_image_without_a_mark_is_an_error(model, sample):
    prompt = sample(2, "image", 4)
    with pytest.raises(ValueError, match="1 images for 0 <image> marks .* write <image>"):
        model.generate(text_of(9), images=prompt.images, max_new_tokens=1)
    with pytest.raises(ValueError, match="write <image>"):
        model(input_ids=text_of(9), images=prompt.images)


@pytest.mark.parametrize(
    "ids, mask, says",
    [
        ([1, 5], None, r"input_ids must be \(prompts, tokens\), .* not \(2,\)"),
        ([[]], None, r"not \(1, 0\)"),
        ([[1, -5]], None, "input_ids hold -5, which is neither a token"),
        ([[1, 10**6]], None, "input_ids hold 1000000"),
        ([[1, 5, 6]], [[1, 1]], r"attention_mask \(1, 2\) must have the shape of input_ids"),
    ],
)
def test_ids_that_are_no_prompt_are_refused(model, ids, mask, says):
    mask = None if mask is None else torch.tensor(mask)
    with pytest.raises(ValueError, match=says):
        model.generate(torch.tensor(ids).long(), attention_mask=mask, max_new_tokens=1)


def test_ids_below_the_padding_mean_nothing(model):
    ids, mask = torch.tensor([[10**6, -7, 5, 6]]), torch.tensor([[0, 0, 1, 1]])
    options = dict(max_new_tokens=2, do_sample=False)
    plain = model.generate(ids[:, 2:], **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), plain)


def test_a_picture_in_place_of_its_pixels_is_an_error(model, sample):
    with pytest.raises(ValueError, match="images must be tensors, as process_images .* not Image"):
        model.generate(sample(2, "image", 4).ids, images=[Image.new("RGB", (8, 8))])
