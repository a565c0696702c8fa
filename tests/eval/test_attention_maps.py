"""Pictures of what the tokens of an answer attend to: every family, pruned or not."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from llava.eval import attention_maps as program
from tests.eval import eval_cases
from tests.paths import GOLDEN

SIZES = ((90, 60), (40, 64))
MODELS = {
    "tiny-llava-v1.5": ["--pruning-method", "fastv", "--visual-token-num", "30"],
    "tiny-llava-v1.6": ["--pruning-method", "random", "--visual-token-num", "100"],
    "tiny-qwen2.5-vl-cut": ["--pruning-method", "random", "--visual-token-num", "2"],
}
#: a method after which images have other grids than before, where these are their own
SMALLER = ["--pruning-method", "downsample", "--visual-token-ratio", "0.5"]


@pytest.mark.parametrize("pruned", [[], "pruned", "smaller"], ids=["whole", "pruned", "smaller"])
@pytest.mark.parametrize("name", MODELS)
def test_every_token_gets_a_picture_of_both_images(name, pruned, tmp_path):
    files = []
    for number, size in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8)
        files.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(pixels).save(files[-1])
    argv = ["--model-path", GOLDEN / name, "--image-file", ",".join(files), "--layer", -1]
    argv += ["--query", "<image-placeholder> and <image-placeholder>?", "--max-new-tokens", 3]
    argv += ["--output-dir", tmp_path / "maps", "--device", "cpu", "--dtype", "float32"]
    argv += pruned and (MODELS[name] if pruned == "pruned" else SMALLER)
    printed = eval_cases.run_program("llava.eval.attention_maps", list(map(str, argv)))
    assert f"-> {tmp_path / 'maps'}" in printed
    tokens = json.loads((tmp_path / "maps/attention.json").read_text())
    pictures = sorted((tmp_path / "maps").glob("0*.png"))
    assert len(tokens) == len(pictures) >= 1
    for token in tokens:
        assert len(token["shares"]) == 2 and 0 < sum(token["shares"]) < 1
    sheet = Image.open(tmp_path / "maps/overview.png")
    assert sheet.width >= len(tokens) * (Image.open(pictures[0]).width // 2)


@pytest.mark.parametrize("text", ["A red ring, 🙂 日本", "Yes.\n  No", ""])
@pytest.mark.parametrize("name", ["tiny-llava-v1.5", "tiny-qwen2.5-vl-cut"])
def test_the_texts_of_tokens_are_those_of_the_answer_with_its_spaces(name, text):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / name)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    texts = program.token_texts(tokenizer, [*ids, tokenizer.eos_token_id])
    assert len(texts) == len(ids) + 1 and "".join(texts) == text + tokenizer.eos_token


def test_a_map_is_red_where_most_goes_and_grey_where_tokens_are_gone():
    boxes = [np.array([[0, 0, 50, 50], [50, 0, 100, 50], [0, 50, 50, 100], [50, 50, 100, 100]])]
    values = np.array([0.3, 0.0, np.nan, 0.15], np.float32)
    drawn = np.asarray(program.draw_map(Image.new("RGB", (100, 100), (90, 120, 30)), values, boxes))
    at = [drawn[y, x].tolist() for y, x in ((100, 100), (100, 340), (340, 100), (340, 340))]
    assert at[0][0] > 150 > at[0][2] and at[1][2] > 150 > at[1][0]
    assert len(set(at[2])) == 1 and at[3][1] > 150


def test_tokens_that_a_layer_does_not_hold_have_no_value():
    values, patches = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([2, -1, 0])
    alive = torch.tensor([True, True, False])
    found = program.per_patch(values, patches, alive, 4)
    assert np.isnan(found[[0, 1, 3]]).all() and found[2] == np.float32(0.1)


def test_a_head_or_a_layer_that_is_not_there_is_named(tmp_path):
    argv = ["--model-path", str(GOLDEN / "tiny-llava-v1.5"), "--output-dir", str(tmp_path)]
    argv += ["--device", "cpu"]
    with pytest.raises(SystemExit, match="--head 99 is not one of the"):
        eval_cases.run_program("llava.eval.attention_maps", [*argv, "--head", "99"])
    with pytest.raises(SystemExit, match="attention layer 99 is not one of the"):
        eval_cases.run_program("llava.eval.attention_maps", [*argv, "--layer", "99"])
