"""The front end gives the model what the published steps give it, whatever the images are."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from llava.conversation import conv_templates
from llava.eval.run_llava import build_parser
from llava.front_end import FrontEnd, in_order
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model_args import load_front_end
from llava.video_io import Clip
from tests.paths import GOLDEN

NAMES = ("img0_336x336.png", "img1_640x360.png", "img2_300x480.png")
IMAGES = [Image.open(GOLDEN / "images" / name).convert("RGB") for name in NAMES]


def load(name):
    words = ["--model-path", str(GOLDEN / name), "--device", "cpu", "--dtype", "float32"]
    return load_front_end(build_parser().parse_args(words))


@pytest.fixture(scope="module")
def front():
    return load("tiny-llava-v1.5")


@pytest.fixture(scope="module")
def anyres():
    return load("tiny-llava-v1.6")


def batch(front, *rows):
    """The arguments of `generate` for rows of (text, images)."""
    prompts = [front.encode(front.prompt(text, len(images))) for text, images in rows]
    pictures = [[front.picture(image) for image in images] for _, images in rows]
    return front.inputs(prompts, pictures, [text for text, _ in rows])


def test_a_batch_of_one_is_what_the_published_steps_give(front):
    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], "<image>\nWhat is it?")
    conversation.append_message(conversation.roles[1], None)
    prompt = conversation.get_prompt()
    assert front.prompt("What is it?", num_images=1) == prompt
    ids = tokenizer_image_token(prompt, front.tokenizer, return_tensors="pt")
    pixels = process_images(IMAGES[:1], front.image_processor, front.model.image_settings)
    inputs = batch(front, ("What is it?", IMAGES[:1]))
    assert torch.equal(inputs["input_ids"], ids[None]) and "attention_mask" not in inputs
    assert torch.equal(inputs["images"], pixels) and inputs["image_sizes"] == [(336, 336)]
    assert inputs["questions"] == ["What is it?"]


def test_images_of_different_crops_come_as_a_list_and_equal_ones_in_one_tensor(anyres):
    inputs = batch(anyres, ("These?", IMAGES[:2]), ("And this?", IMAGES[2:]))
    apart = process_images(IMAGES, anyres.image_processor, anyres.model.image_settings)
    assert len({pixels.shape for pixels in apart}) > 1 and isinstance(inputs["images"], list)
    assert all(map(torch.equal, inputs["images"], apart))
    assert inputs["questions"] == ["These?", "These?", "And this?"]
    assert inputs["image_sizes"] == [image.size for image in IMAGES]
    same = batch(anyres, ("This?", IMAGES[:1]), ("And this?", IMAGES[:1]))
    assert torch.is_tensor(same["images"]) and same["images"].shape[0] == 2


def test_shorter_prompts_are_padded_on_the_left_and_masked(front):
    inputs = batch(front, ("Why?", []), ("What is there to be seen on it?", IMAGES[:1]))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    short = front.encode(front.prompt("Why?"))
    assert torch.equal(ids[0, -len(short) :], short) and mask[0].sum() == len(short)
    assert mask[1].all() and mask[0, -1] == 1
    assert inputs["questions"] == ["What is there to be seen on it?"]  # one per image


def test_a_text_without_images_has_none(front):
    assert {"images", "image_sizes", "questions"}.isdisjoint(batch(front, ("Why?", [])))


def test_marks_stand_where_the_text_has_them_or_in_front(front, monkeypatch):
    assert front.marked("Why?", 2) == "<image>\n<image>\nWhy?"
    assert front.marked("Is <image> like <image>?", 2) == "Is <image> like <image>?"
    assert front.marked("Why?") == "Why?"
    monkeypatch.setattr(front.model.config, "mm_use_im_start_end", True)
    wrapped = "<im_start><image><im_end>"
    assert front.marked("Why?", 1) == f"{wrapped}\nWhy?"
    assert front.marked("Is <image> red?", 1) == f"Is {wrapped} red?"


@pytest.fixture(scope="module")
def own_grids():
    return load("tiny-qwen2.5-vl-cut")


def test_videos_have_marks_like_images_behind_them(own_grids):
    mark = "<|vision_start|><image><|vision_end|>"
    assert own_grids.marked("Why?", 1, 2) == f"{mark * 3}Why?"
    assert own_grids.marked("<video>\nas <image>", 1, 1) == f"{mark}\nas {mark}".replace("\n", "")
    assert own_grids.marked("What is <video>?") == "What is <video>?"  # there is none
    with pytest.raises(ValueError, match="not where the 1 videos do: write <video>"):
        own_grids.marked("Is it <image>?", 1, 1)


def test_a_text_says_the_order_of_images_and_videos():
    assert in_order("Why?", ["a"], ["b"]) == ["a", "b"]
    assert in_order("<video> <image> <video>", ["a"], ["b", "c"]) == ["b", "a", "c"]
    with pytest.raises(ValueError, match="says <video> 1 times, for 2 of them"):
        in_order("<video> <image>", ["a"], ["b", "c"])


def test_a_video_is_prepared_with_its_rate(own_grids, front):
    clip = Clip([image.resize((112, 84)) for image in IMAGES], fps=1.5)
    shown = own_grids.video(clip)
    assert len(shown.pixels) == 2 and shown.pixels.seconds == 2 / 1.5 and shown.size == (112, 84)
    ids = own_grids.encode(own_grids.prompt("Why?", num_videos=1))
    inputs = own_grids.inputs([ids], [[shown]], ["Why?"])
    assert own_grids.model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    with pytest.raises(ValueError, match="LlavaLlamaForCausalLM takes no videos: give single"):
        front.video(clip)


def test_only_so_many_marks_of_a_prompt_are_images(front):
    prompt = front.prompt("<image>\nWhat does <image> mean?")
    assert (front.encode(prompt) == -200).sum() == 2
    assert (front.encode(prompt, num_images=1) == -200).sum() == 1


def test_an_unknown_template_is_named(front):
    with pytest.raises(ValueError, match="unknown conv mode 'vicuna', choose from"):
        FrontEnd(front.tokenizer, front.model, front.image_processor, "vicuna")


def test_a_system_text_takes_the_place_of_the_templates():
    front = FrontEnd(None, None, None, "qwen2_5_vl", system="Be brief.")
    conversation = front.conversation()
    conversation.append_message(conversation.roles[0], "Hi")
    assert conversation.get_prompt().startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    assert FrontEnd(None, None, None, "qwen2_5_vl").conversation().system.endswith("assistant.")
