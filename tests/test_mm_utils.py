"""Image preparation, tokenisation with images and stop words against the recorded cases."""

import hashlib
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    LlamaTokenizer,
    LlamaTokenizerFast,
)

from llava import image_io, mm_utils
from tests.golden_data import GOLDEN, golden_json

PIXELS = golden_json("llava-base/preprocess.json")
TEXT = golden_json("llava-base/text_utils.json")
SAMPLED = np.load(GOLDEN / "llava-base/preprocess_sampled.npz")
PINPOINTS = PIXELS["best_resolution"]["v1.6"]["pinpoints"]
RESOLUTION_CASES = [
    (record["pinpoints"], case)
    for record in PIXELS["best_resolution"].values()
    for case in record["cases"]
]


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessor.from_pretrained(GOLDEN / "tiny-clip-vit-l14-336")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(GOLDEN / "tiny-llava-v1.5", use_fast=False)


def open_image(name):
    return Image.open(GOLDEN / "images" / name).convert("RGB")


def config(mode, pinpoints=PINPOINTS):
    return SimpleNamespace(image_aspect_ratio=mode, image_grid_pinpoints=pinpoints)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def tile_hashes(pixels, processor):
    """Hash per tile of the 8-bit pixels (3, S, S) behind normalised ones (..., 3, S, S)."""
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std)
    )
    tiles = ((pixels.flatten(0, -4) * std + mean) * 255).round().to(torch.uint8)
    return [sha256(tile.numpy().tobytes()) for tile in tiles]


@pytest.mark.parametrize("case", PIXELS["process_images"], ids=lambda case: case["sampled_key"])
def test_every_pixel_is_the_recorded_one(processor, case):
    pixels = mm_utils.process_images([open_image(case["image"])], processor, config(case["mode"]))
    assert list(pixels.shape) == case["shape"]
    assert str(pixels.dtype) == case["dtype"]
    assert tile_hashes(pixels, processor) == case["uint8_tile_sha256"]
    sampled = pixels.flatten(0, -4)[:, :, 12::24, 12::24].numpy()
    np.testing.assert_allclose(sampled, SAMPLED[case["sampled_key"]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", PIXELS["result_types"])
def test_images_are_stacked_when_their_shapes_agree(processor, case):
    images = [open_image(name) for name in case["images"]]
    pixels = mm_utils.process_images(images, processor, config(case["mode"]))
    if isinstance(pixels, list):
        result = f"list {[list(p.shape) for p in pixels]}"
    else:
        result = f"tensor {list(pixels.shape)}"
    assert result == case["result"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("ratio", [None, "pad", "anyres"])
def test_images_of_every_color_mode_are_prepared(processor, mode, ratio):
    image = Image.new(mode, (40, 20))
    pixels = mm_utils.process_images([image], processor, config(ratio))
    assert pixels.shape[-3:] == (3, 336, 336)


def test_an_image_of_three_rows_is_not_taken_for_channels_first(processor):
    image = Image.new("RGB", (3, 3), (255, 0, 0))
    pixels = mm_utils.process_images([image], processor, config("pad"))
    assert pixels[0, 0].min() > 0 > pixels[0, 1].max()


@pytest.mark.parametrize("case", PIXELS["expand2square"], ids=lambda case: case["image"])
def test_expand2square_centres_the_image(case):
    image = open_image(case["image"])
    square = mm_utils.expand2square(image, (122, 116, 104))
    assert list(square.size) == case["out_size"]
    assert sha256(square.tobytes()) == case["rgb_sha256"]
    assert (square is image) == (image.width == image.height)


@pytest.mark.parametrize("case", PIXELS["resize_and_pad"], ids=lambda case: case["image"])
def test_resize_and_pad_is_pixel_exact(case):
    padded = mm_utils.resize_and_pad_image(open_image(case["image"]), case["target"])
    assert sha256(padded.tobytes()) == case["rgb_sha256"]


@pytest.mark.parametrize("case", PIXELS["resize_and_pad_geometry"], ids=str)
def test_resize_and_pad_puts_the_image_in_the_middle(case):
    white = Image.new("RGB", case["size"], (255, 255, 255))
    padded = mm_utils.resize_and_pad_image(white, case["target"])
    left, top, right, bottom = padded.getbbox()
    found = {"x0": left, "y0": top, "w": right - left, "h": bottom - top}
    assert found == {key: case[key] for key in found}


@pytest.mark.parametrize("pinpoints, case", RESOLUTION_CASES)
def test_best_resolution_is_the_recorded_one(pinpoints, case):
    best = mm_utils.select_best_resolution(case["size"], pinpoints)
    assert best == tuple(case["best"])
    if case["grid_wh"]:
        for given in (pinpoints, str(pinpoints)):
            grid = mm_utils.get_anyres_image_grid_shape(case["size"], given, 336)
            assert grid == tuple(case["grid_wh"])


def test_an_image_without_a_visible_pixel_has_no_resolution(processor):
    assert mm_utils.select_best_resolution((5000, 1), PINPOINTS) is None
    with pytest.raises(ValueError, match="5000 x 1 is too thin"):
        mm_utils.process_images([Image.new("RGB", (5000, 1))], processor, config("anyres"))


@pytest.mark.parametrize(
    "case", PIXELS["divide_to_patches"], ids=lambda case: str(case["image_size"])
)
def test_tiles_go_row_by_row(case):
    width, height = case["image_size"]
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = Image.fromarray(np.stack([x // 4, y // 4, x * 0 + 1], axis=-1).astype(np.uint8))
    tiles = mm_utils.divide_to_patches(image, case["patch"])
    assert [list(tile.size) for tile in tiles] == case["sizes"]
    origins = [[4 * tile.getpixel((0, 0))[0], 4 * tile.getpixel((0, 0))[1]] for tile in tiles]
    assert origins == case["top_left_origin"]


@pytest.mark.parametrize(
    "case", TEXT["tokenizer_image_token"], ids=lambda case: case["prompt"][-30:]
)
def test_image_tokens_stand_between_the_recorded_ids(tokenizer, case):
    tokenize = mm_utils.tokenizer_image_token
    assert tokenize(case["prompt"], tokenizer) == case["ids"]
    assert tokenize(case["prompt"], tokenizer, -1) == case["ids_index_m1"]
    ids = tokenize(case["prompt"], tokenizer, return_tensors="pt")
    assert ids.dtype == torch.long and ids.tolist() == case["ids"]


def test_an_unknown_tensor_type_is_an_error(tokenizer):
    with pytest.raises(ValueError, match=TEXT["bad_return_tensors"]["text"]):
        mm_utils.tokenizer_image_token("x", tokenizer, return_tensors="np")


@pytest.mark.parametrize("case", TEXT["get_model_name_from_path"], ids=lambda case: case["path"])
def test_model_names_are_the_recorded_ones(case):
    assert mm_utils.get_model_name_from_path(case["path"]) == case["name"]


@pytest.mark.parametrize(
    "path, name",
    [
        ("checkpoint-5/", "my-run_checkpoint-5"),
        ("checkpoint-5", "my-run_checkpoint-5"),
        (".", "my-run"),
        ("./checkpoint-5/.", "my-run_checkpoint-5"),
        ("/checkpoint-5", "checkpoint-5"),
        ("/", "/"),
    ],
)
def test_a_path_that_names_no_model_is_looked_at_from_here(tmp_path, monkeypatch, path, name):
    (tmp_path / "my-run" / "checkpoint-5").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "my-run")
    assert mm_utils.get_model_name_from_path(path) == name


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("llava-v1.5-7b", "vicuna_v1"),
        ("LLaVA-v1.6-Vicuna-13B", "vicuna_v1"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("llava-llama-2-13b-chat", "llava_llama_2"),
        ("llava-mpt-7b", "mpt"),
        ("llava-7b-delta-v0", "llava_v0"),
    ],
)
def test_the_template_follows_from_the_name(name, template):
    assert mm_utils.infer_conv_mode(name) == template


@pytest.mark.parametrize("record", TEXT["keywords_stopping"], ids=lambda r: str(r["keywords"]))
@pytest.mark.parametrize("start", ["prompt", "embeddings", "embeddings and BOS"])
def test_generation_stops_at_the_recorded_keywords(tokenizer, record, start):
    prompt = record["prompt_ids"]
    criteria = mm_utils.KeywordsStoppingCriteria(
        record["keywords"], tokenizer, torch.tensor([prompt])
    )
    assert [ids.tolist() for ids in criteria.keyword_ids] == record["keyword_ids"]
    assert criteria.max_keyword_len == record["max_keyword_len"]
    assert criteria.start_len == record["start_len"]
    before = {"prompt": prompt, "embeddings": [], "embeddings and BOS": [1]}[start]
    for case in record["cases"]:
        row = torch.tensor([before + case["generated_ids"]])
        assert criteria(row, None) is case["stop"], case


def test_a_keyword_in_the_prompt_does_not_stop(tokenizer):
    prompt = torch.tensor([tokenizer("a dog").input_ids])
    criteria = mm_utils.KeywordsStoppingCriteria(["dog"], tokenizer, prompt)
    assert criteria(prompt, None) is False


def test_a_batch_stops_when_every_row_stops(tokenizer):
    dog, red = (tokenizer(word).input_ids[-1] for word in ("a dog", "red"))
    criteria = mm_utils.KeywordsStoppingCriteria(["dog"], tokenizer, torch.tensor([[1], [1]]))
    assert criteria(torch.tensor([[1, dog], [1, red]]), None) is False
    assert criteria(torch.tensor([[1, dog], [1, dog]]), None) is True


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A tokenizer of Llama that has "▁###" for the keyword alone, and "##" "#" behind a letter."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = "a ### b ### c #### d ## e #" * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text]),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=276,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return LlamaTokenizer.from_pretrained(folder)


def steps_to_stop(tokenizer, text: str, keyword: str) -> int | None:
    """After so many tokens of a text generation stops."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    criteria = mm_utils.KeywordsStoppingCriteria([keyword], tokenizer, torch.tensor([[1]]))
    ends = (n for n in range(1, len(ids) + 1) if criteria(torch.tensor([[1, *ids[:n]]])))
    return next(ends, None)


@pytest.mark.parametrize("keyword", ["###", "# #", "🙂"])
@pytest.mark.parametrize("before", ["", "a", "a b\n", "🙂x ", "#"])
def test_a_keyword_of_other_tokens_within_a_text_stops_where_it_ends(pieces, keyword, before):
    ids = pieces(f"{before}{keyword} d", add_special_tokens=False).input_ids
    texts = [pieces.decode(ids[:count]) for count in range(1, len(ids) + 1)]
    expected = next((n for n, text in enumerate(texts, 1) if keyword in text), None)
    assert steps_to_stop(pieces, f"{before}{keyword} d", keyword) == expected


def test_a_line_break_behind_bytes_stops_at_once_with_a_fast_tokenizer(pieces, tmp_path):
    pieces.save_pretrained(tmp_path)
    fast = LlamaTokenizerFast.from_pretrained(tmp_path)
    count = len(fast("a 🙂Ꙋ\n", add_special_tokens=False).input_ids)
    assert steps_to_stop(fast, "a 🙂Ꙋ\nb", "\n") == count


def test_an_empty_keyword_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="non-empty"):
        mm_utils.KeywordsStoppingCriteria([""], tokenizer, torch.tensor([[1]]))


SQUARES = [(640, 360), (300, 480), (337, 336), (336, 335), (7, 1), (1, 9), (2000, 13), (13, 2000)]


@pytest.mark.parametrize("size", SQUARES, ids=str)
@pytest.mark.parametrize("band", [2**20, 1])
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_the_small_square_is_the_large_one_made_small(monkeypatch, size, band, resample):
    monkeypatch.setattr(image_io, "BAND_PIXELS", band)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image, color = Image.fromarray(noise), (122, 116, 104)
    for side in (14, 336):
        wanted = mm_utils.expand2square(image, color).resize((side, side), resample)
        assert image_io.resized_square(image, color, side, resample).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("size", [(4000, 40), (40, 4000), (4001, 40), (1300, 40)], ids=str)
def test_only_the_middle_of_a_very_long_image_is_enlarged(processor, monkeypatch, size):
    ramp = np.abs(np.linspace(-1, 1, size[0]))[None] * np.ones((size[1], 1))
    image = Image.fromarray((np.dstack([ramp] * 3) * 255).astype(np.uint8))
    ours = mm_utils.process_images([image], processor, config(None))
    monkeypatch.setattr(mm_utils, "LONGEST", 10**6)
    whole = mm_utils.process_images([image], processor, config(None))
    assert (ours - whole).abs().max() < 0.05


MEMORY = """
from types import SimpleNamespace
from PIL import Image
from transformers import CLIPImageProcessor
from llava.conversation import conv_templates
from llava.mm_utils import process_images

size = {"height": 336, "width": 336}
processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=size)
grid = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

def prepare(images, long=()):
    for image in images:
        conv_templates["vicuna_v1"].process_image(image, "Pad", return_pil=True)
    for mode in ("anyres", "pad", "crop"):
        config = SimpleNamespace(image_aspect_ratio=mode, image_grid_pinpoints=grid)
        process_images([*images, *(() if mode == "anyres" else long)], processor, config)

def peak():  # of this program alone: `ru_maxrss` begins with what its parent had
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024  # MiB

prepare([Image.new("RGB", (400, 300))])
images = [Image.new("RGB", side) for side in ((8192, 164), (164, 8192)) * 2]
before = peak()
prepare(images, [Image.new("RGB", (5000, 1))])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_long_images_need_little_memory():
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 120  # MiB; four padded squares took 3,000
