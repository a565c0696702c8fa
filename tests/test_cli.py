"""run_llava, the chat, and the pictures of kept patches, on the tiny recorded checkpoint."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from llava import playground
from llava.eval import run_llava
from llava.image_settings import ImageSettings
from llava.pruning import DecoderPruner, build_pruner, trace_pruning
from llava.pruning.cli import pruner_from_args
from llava.pruning.picture import crop_boxes, surviving_patches
from llava.serve import cli
from tests.paths import GOLDEN

MODEL = str(GOLDEN / "tiny-llava-v1.5")
ANYRES = str(GOLDEN / "tiny-llava-v1.6")
IMAGE = str(GOLDEN / "images/img1_640x360.png")
TALL = str(GOLDEN / "images/img2_300x480.png")


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments, program=run_llava) -> what the program printed."""

    def call(*arguments, program=run_llava):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        program.main()
        return capsys.readouterr().out

    return call


def ask(*more, model=MODEL, image=IMAGE, query="What is it?"):
    basics = ["--model-path", model, "--image-file", image, "--query", query]
    return [*basics, "--max_new_tokens", 4, "--temperature", 0, *more]


def test_the_answer_is_printed_and_the_same_in_every_run(run):
    first = run(*ask("--pruning-method", "vispruner", "--visual-token-num", 64))
    assert first.strip()
    assert first == run(*ask("--pruning_method", "vispruner", "--visual_token_num", 64))


def test_an_object_with_the_attributes_of_the_readme_is_enough(capsys):
    args = type(
        "Args",
        (),
        {
            "model_path": MODEL,
            "model_base": None,
            "model_name": "tiny-llava-v1.5",
            "query": "What is it?",
            "conv_mode": None,
            "image_file": IMAGE,
            "sep": ",",
            "temperature": 0,
            "top_p": None,
            "num_beams": 1,
            "max_new_tokens": 4,
        },
    )()
    assert run_llava.eval_model(args) is None
    assert capsys.readouterr().out.strip()


def test_attributes_of_methods_are_options_as_well(monkeypatch):
    seen = []
    monkeypatch.setattr(run_llava, "answer", lambda args: seen.append(pruner_from_args(args)))
    args = type("Args", (), {"query": "?", "visual_token_num": 48, "important_ratio": 0.25})()
    run_llava.eval_model(args)
    assert seen == [build_pruner("vispruner", visual_token_num=48, important_ratio=0.25)]


def test_flags_may_be_written_with_dashes_and_underscores():
    dashes = ["--model-path", "m", "--image-file", "i", "--top-p", "0.5", "--max-new-tokens", "3"]
    parse = run_llava.build_parser().parse_args
    assert parse(dashes) == parse([flag.replace("-", "_").replace("__", "--") for flag in dashes])


def test_kept_patches_of_several_anyres_images_are_drawn(run, tmp_path):
    picture = tmp_path / "kept.png"
    query = "<image-placeholder> and <image-placeholder>: which?"
    budget = ["--pruning-method", "vispruner", "--visual-token-num", 160]
    images = f"{IMAGE}|{TALL}"
    more = ["--sep", "|", *budget, "--show-pruning", picture]
    run(*ask(*more, model=ANYRES, image=images, query=query))
    pixels = np.asarray(Image.open(picture))
    assert pixels.shape[1] > 4 * 300  # two images, each as overview and tiles
    assert (pixels == [255, 200, 0]).all(axis=2).any()


def test_a_question_about_a_video_and_an_image(monkeypatch, tmp_path, capsys):
    frames = [Image.new("RGB", (168, 112), (12 * n, 90, 0)) for n in range(17)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=250)
    picture = tmp_path / "kept.png"
    options = ["--video-file", tmp_path / "clip.gif", "--fps", 8, "--num-frames", 14]
    options += ["--video-min-pixels", 8 * 784, "--pruning-method", "vispruner"]
    query = "<video-placeholder> and <image-placeholder>: which?"
    more = ["--visual-token-num", 14, "--show-pruning", picture]
    words = ask(*options, *more, model=str(GOLDEN / "tiny-qwen2.5-vl-cut"), query=query)
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
    run_llava.main()
    assert "clip.gif, 14 frames, 3.29 a second" in capsys.readouterr().err
    pixels = np.asarray(Image.open(picture))
    assert pixels.shape[1] == 7 * 560 + 8 * 12  # six of the seven pairs of frames, the image
    assert (pixels == [255, 200, 0]).all(axis=2).any()


def test_a_prompt_that_is_too_long_ends_with_both_numbers(run):
    with pytest.raises(SystemExit, match=r"takes \d+ positions, and the model has \d+ "):
        run(*ask(query="word " * 6000))


BAD = {
    "a missing image": (ask(image="no.png"), "image file not found: no.png"),
    "an unknown method": (ask("--pruning-method", "magic"), "unknown pruning method 'magic'"),
    "an unknown template": (ask("--conv-mode", "magic"), "unknown conv mode 'magic'"),
    "budget 0": (
        ask("--pruning-method", "random", "--visual-token-num", 0),
        "visual_token_num (0) must be a whole number of at least 1",
    ),
    "a budget above the patch count": (
        ask("--pruning-method", "random", "--visual-token-num", 577),
        "visual_token_num (577) exceeds the 576 patches",
    ),
    "an image of a variable that is not set": (ask(image=""), "--image-file is empty"),
    "an empty name between others": (
        ask(image=f"{IMAGE},"),
        "png,' has an empty name in it: name a file, or leave the option out",
    ),
    "a video of a variable that is not set": (
        ask("--video-file", " "),
        "--video-file is empty",
    ),
    "nothing between files": (ask("--sep", ""), "--sep is empty"),
    "more images than marks": (ask(image=f"{IMAGE},{TALL}"), "2 images, but the query has places"),
    "more marks than images": (
        ask(query="<image-placeholder> <image-placeholder>"),
        "1 images, but the query has places for 2",
    ),
    "no question": (["--image-file", IMAGE], "--query is missing"),
    "an empty question": (["--query", " "], "--query is empty"),
    "a video for a model of images": (
        ask(
            "--video-file", str(GOLDEN / "images"), query="<video-placeholder> <image-placeholder>"
        ),
        "takes no videos: give single frames as images",
    ),
    "a video without a place": (
        ask("--video-file", IMAGE, query="What is <image-placeholder>?"),
        "1 videos, but the query has places for 0: write <video-placeholder>",
    ),
    "frames without a video": (ask("--num-frames", 4), "there is no --video-file"),
    "a picture of no type": (ask("--show-pruning", "kept"), "must end in .png"),
    "a model that is not there": (ask(model="./nowhere"), "./nowhere"),
    "a device that there is not": (ask("--device", "gpu"), "unknown device 'gpu', choose cuda"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD.keys())
def test_bad_input_ends_with_a_message(run, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert str(stop.value.code).startswith("error: ")
    assert message in stop.value.code


def test_a_corrupt_image_ends_with_a_message(run, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(IMAGE).read_bytes()[:500])
    with pytest.raises(SystemExit, match="cannot read image .*broken.png"):
        run(*ask(image=broken))


def test_a_checkpoint_without_a_tower_ends_with_a_message(run, tmp_path):
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=700,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "llama" / name).write_bytes((Path(MODEL) / name).read_bytes())
    with pytest.raises(SystemExit, match="without a vision tower"):
        run(*ask(model=tmp_path / "llama"))


def test_the_exit_code_of_bad_input_is_1():
    command = [sys.executable, "-m", "llava.eval.run_llava", *map(str, ask(image="no.png"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=GOLDEN.parents[1])
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "error: image file not found: no.png"


def test_patches_that_a_layer_of_the_decoder_dropped_are_not_drawn(model, sample):
    prompt = sample(3, "image", 2, "image", 2)
    ids, images = prompt.ids, prompt.images
    model.pruner = DecoderPruner(visual_token_num=5, layer=2)
    with trace_pruning(model) as trace:
        model.generate(ids, images=images, max_new_tokens=1, do_sample=False)
    survivors = surviving_patches(trace, ids[0])
    assert [len(patches) for patches in survivors] == [5, 5]
    assert all(patches.tolist() == sorted(set(patches.tolist())) for patches in survivors)
    model.pruner = build_pruner("none")
    with trace_pruning(model) as trace:
        model.generate(ids, images=images, max_new_tokens=1, do_sample=False)
    assert [patches.tolist() for patches in surviving_patches(trace, ids[0])] == [[*range(36)]] * 2


class Tower:
    """4 x 4 patches of 10 pixels."""

    num_patches_per_side, image_size = 4, 40


@pytest.mark.parametrize(
    "mode, first",
    [("pad", [0, -20, 20, 0]), (None, [20, 0, 30, 10])],
    ids=["padded to a square", "cut to a square"],
)
def test_patches_lie_where_the_preprocessing_put_them(mode, first):
    (boxes,) = crop_boxes((80, 40), ImageSettings(mode), Tower)
    assert boxes.shape == (16, 4)
    assert boxes[0].tolist() == first


def test_tiles_lie_side_by_side_on_the_image():
    settings = ImageSettings("anyres", image_grid_pinpoints=((80, 40),))
    overview, left, right = crop_boxes((160, 60), settings, Tower)
    assert overview[0].tolist() == [0, 0, 40, 15]
    assert left[0].tolist() == [0, -10, 20, 10]  # 160 x 60 stands in the middle of 160 x 80
    assert right[-1].tolist() == [140, 50, 160, 70]


def test_tiles_are_those_of_the_canvas_that_was_chosen():
    canvases = ((40, 80), (80, 40))  # either shows all of a small image; the wide one is filled
    size, narrow = (20, 10), ImageSettings("anyres", canvases)
    wide = ImageSettings("anyres", canvases, anyres_selection="fill")
    assert crop_boxes(size, narrow, Tower)[1][0].tolist() == [0, -15, 5, -10]
    assert crop_boxes(size, wide, Tower)[1][0].tolist() == [0, 0, 2.5, 2.5]


def test_the_chat_remembers_and_keeps_end_marks_out_of_its_history(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\nAnd now?\n\n"))
    args = ["--model-path", MODEL, "--image-file", IMAGE, "--temperature", 0]
    args += ["--max-new-tokens", 4, "--debug", "--pruning-method", "random"]
    out = run(*args, program=cli)
    prompts = [line for line in out.splitlines() if line.startswith("{'prompt'")]
    assert len(prompts) == 2
    assert prompts[1].count("<image>") == 1
    assert "What is it?" in prompts[1] and "<s>" not in prompts[1]


def test_turns_have_names_without_the_marks_of_the_template(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n\n"))
    args = ["--model-path", MODEL, "--image-file", IMAGE, "--temperature", 0]
    out = run(*args, "--max-new-tokens", 2, "--conv-mode", "chatml_direct", program=cli)
    assert "user: assistant: " in out and "<|im_start|>" not in out


def test_the_streamed_answer_is_the_answer(capsys):
    args = cli.build_parser().parse_args(["--model-path", MODEL, "--image-file", IMAGE])
    args.temperature, args.max_new_tokens = 0, 4
    chat = cli.open_chat(args)
    capsys.readouterr()
    streamer = cli.AnswerStreamer(chat.front.tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = chat.ask("What is it?", streamer)
    assert capsys.readouterr().out.strip() == answer
    assert torch.is_tensor(chat.picture.pixels)


def open_chat(**changes):
    args = cli.build_parser().parse_args(["--model-path", MODEL, "--image-file", IMAGE])
    args.temperature, args.max_new_tokens = 0, 2
    for name, value in changes.items():
        setattr(args, name, value)
    return cli.open_chat(args)


@pytest.mark.parametrize("image_file", ["", " "])
def test_a_chat_about_an_image_without_a_name_does_not_begin(image_file):
    with pytest.raises(ValueError, match="--image-file is empty"):
        open_chat(image_file=image_file)


def test_what_is_typed_is_text(capsys):
    chat = open_chat()
    typed = "What does <image> mean, and <image-placeholder>?"
    plain = chat.front.tokenizer("<image>", add_special_tokens=False).input_ids
    for _ in range(2):
        chat.ask(typed)
    prompt = chat.conversation.get_prompt()
    ids = chat.front.encode(prompt, num_images=1).tolist()
    assert ids.count(-200) == 1 and len(plain) > 1
    assert chat.front.tokenizer.decode([i for i in ids if i != -200]).count(typed) == 2


def test_one_bad_question_does_not_end_the_chat(run, monkeypatch):
    long = "word " * 6000
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{long}\nWhat is it?\n{long}\nAnd now?\n\n"))
    args = ["--model-path", MODEL, "--image-file", IMAGE, "--temperature", 0]
    out = run(*args, "--max-new-tokens", 4, "--debug", program=cli)
    assert out.count("this question cannot be answered: the prompt takes") == 2
    assert "(max_position_embeddings)" in out and out.strip().endswith("exit...")
    prompts = [line for line in out.splitlines() if line.startswith("{'prompt'")]
    assert len(prompts) == 2  # those in between, as if nothing else had been asked
    assert "word word" not in prompts[1] and prompts[1].count("USER:") == 2
    assert prompts[1].count("<image>") == 1


def test_a_missing_playground_is_named(monkeypatch, tmp_path, run):
    monkeypatch.setattr(playground, "ROOT", tmp_path / "playground")
    with pytest.raises(SystemExit, match="playground is not here .*--model-path"):
        run()


def test_the_first_image_of_the_playground_is_the_default(monkeypatch, tmp_path):
    folder = tmp_path / "benchmark/images"
    folder.mkdir(parents=True)
    for name in ("b.png", "a.jpg", "0.txt"):
        (folder / name).touch()
    monkeypatch.setattr(playground, "ROOT", tmp_path)
    assert playground.default_image() == str(folder / "a.jpg")


@pytest.mark.skipif(
    not (playground.ROOT / playground.CHECKPOINT / "config.json").is_file(),
    reason="the playground checkpoint is not there",
)
def test_without_options_the_playground_answers(run, tmp_path):
    picture = tmp_path / "kept.png"
    budget = ["--pruning-method", "vispruner", "--visual-token-num", 64]
    assert run("--temperature", 0, *budget, "--show-pruning", picture).strip() == "red"
    assert picture.is_file()
