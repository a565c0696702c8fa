"""The playground: scenes, questions, benchmark files and the shipped checkpoints."""

import json
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTokenizer, HfArgumentParser, LlamaTokenizer

from llava.eval.benchmarks.refcoco import iou
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.train import train_twigvlm_plus
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
from llava.train.glimpse.arguments import (
    BoxArguments,
    GlimpseArguments,
    GlimpseTrainingArguments,
)
from llava.train.run import own_precision
from llava.train.train_twigvlm import TwigArguments
from playground import (
    clip_files,
    decoder_text,
    fast_train,
    make_data,
    questions,
    scenes,
    tokenizer,
    train,
)
from playground import tower_model as tower
from playground.train import LLAVA, TOWER

BENCHMARK = Path(make_data.ROOT) / "benchmark"
HELD_OUT = scenes.HELD_OUT_SEEDS


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Scenes --------------------------------------------------------------------------------------


def test_a_seed_always_gives_the_same_scene_and_picture():
    assert scenes.make_scene(5) == scenes.make_scene(5) != scenes.make_scene(6)
    first, second = (scenes.render(scenes.make_scene(5)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (336, 336, 3) and first.dtype == np.uint8


@pytest.mark.parametrize("seed", range(6))
def test_annotated_boxes_hold_ink_of_their_color(seed):
    scene = scenes.make_scene(seed)
    image = scenes.render(scene).astype(int)
    for thing in scene.things:
        left, top, right, bottom = thing.box
        inked = scenes.thing_mask(thing.kind, right - left) > 0.99
        found = np.median(image[top:bottom, left:right][inked], axis=0)
        assert np.abs(found - scenes.COLORS[thing.color]).max() <= 11, thing


@pytest.mark.parametrize("seed", range(6))
def test_things_and_signs_keep_their_distance_and_have_different_names(seed):
    scene = scenes.make_scene(seed)
    items = (*scene.things, *scene.signs)
    assert len({item.name for item in items}) == len(items)
    for one in items:
        for other in items:
            assert one is other or iou(one.box, other.box) == 0


def test_an_unknown_kind_is_refused_with_the_possible_ones():
    with pytest.raises(ValueError, match="unknown kind 'cube'.*ball"):
        scenes.thing_mask("cube", 30)


def test_held_out_seeds_are_never_trained_on():
    most = max(make_data.PICTURES, 500_000_096)
    assert scenes.TRAIN_SEEDS + 10**8 < HELD_OUT
    assert HELD_OUT + most > HELD_OUT + make_data.PICTURES > HELD_OUT


# Questions -----------------------------------------------------------------------------------


def many(task, count=400):
    asked = (task(scenes.make_scene(s), np.random.default_rng(s)) for s in range(count))
    return [question for question in asked if question is not None]


@pytest.mark.parametrize("task", [questions.existence, questions.any_statement])
def test_yes_and_no_are_balanced(task):
    share = np.mean([question.answer == "Yes" for question in many(task)])
    assert 0.42 < share < 0.58


def test_relations_are_true_of_the_boxes():
    for seed in range(100):
        scene = scenes.make_scene(seed)
        question = questions.relation(scene, np.random.default_rng(seed), choose=False)
        for side, axis, sign in (("left of", 0, -1), ("above", 1, -1)):
            if question and f" {side} the " in question.text:
                first, second = (
                    question.bare.removeprefix("Is the ").rstrip("?").split(f" {side} the ")
                )
                place = {t.name: t.box[axis] + t.box[axis + 2] for t in scene.things}
                holds = (place[first] - place[second]) * sign > 0
                assert question.answer == ("Yes" if holds else "No")


def test_counts_are_spread():
    counts = Counter(question.answer for question in many(questions.counting))
    assert len(counts) >= 6 and max(counts.values()) < 0.5 * sum(counts.values())


def test_option_letters_are_balanced():
    letters = Counter(question.answer for question in many(questions.options, 900))
    assert min(letters[letter] for letter in "ABC") > 0.75 * max(letters.values())


# Benchmark files -----------------------------------------------------------------------------


def test_question_files_are_what_the_generator_writes(tmp_path):
    make_data.write_textvqa(tmp_path / "textvqa")
    make_data.write_pope(tmp_path / "pope")
    make_data.write_gqa(tmp_path / "gqa")
    make_data.write_refcoco(tmp_path / "refcoco")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 10
    for path in written:
        assert path.read_bytes() == (BENCHMARK / path.relative_to(tmp_path)).read_bytes(), path


def test_every_task_has_300_questions_on_pictures_that_exist():
    files = [*BENCHMARK.glob("*/llava_*.jsonl")]
    assert len(files) == 6
    used = set()
    for path in files:
        lines = read_lines(path)
        assert len(lines) >= 300, path
        used |= {line["image"] for line in lines}
    table = (BENCHMARK / "mmbench" / "mmbench_dev_20230712.tsv").read_text(encoding="utf-8")
    assert len(table.splitlines()) == 301
    assert len(used) >= 200
    assert used <= {path.name for path in (BENCHMARK / "images").iterdir()}


def test_pope_answers_are_balanced_per_category():
    for path in (BENCHMARK / "pope" / "coco").iterdir():
        labels = Counter(line["label"] for line in read_lines(path))
        assert labels["yes"] == labels["no"] == 120, path


def test_pictures_on_disk_show_their_scenes():
    for index in (0, 17, 239):
        with Image.open(BENCHMARK / "images" / make_data.picture_name(index)) as image:
            stored = np.asarray(image.convert("RGB")).astype(int)
        drawn = scenes.render(make_data.held_out(index)).astype(int)
        assert np.abs(stored - drawn).mean() < 6


def test_a_training_record_has_one_image_mark_and_alternating_turns():
    record = make_data.conversation(3, "3.png")
    text = [turn["value"] for turn in record["conversations"]]
    assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * (len(text) // 2)
    assert text[0].startswith("<image>\n") and sum("<image>" in value for value in text) == 1
    lengths = {len(make_data.conversation(seed, "", 3)["conversations"]) for seed in range(30)}
    assert lengths == {2, 4, 6}


def test_the_stages_of_the_training_name_options_that_exist(tmp_path, monkeypatch):
    classes = {
        "llava.train.train": (ModelArguments, DataArguments, TrainingArguments),
        "llava.train.train_twigvlm": (
            TwigArguments,
            ModelArguments,
            DataArguments,
            TrainingArguments,
        ),
        "llava.train.train_glimpseprune": (
            GlimpseArguments,
            BoxArguments,
            GlimpseTrainingArguments,
        ),
        "llava.train.train_twigvlm_plus": train_twigvlm_plus.CLASSES,
    }
    ran = []

    def parse(module, options):
        with own_precision():  # --bf16 would stay for later tests
            HfArgumentParser(classes[module]).parse_args_into_dataclasses(train.as_words(options))
        ran.append(module)

    monkeypatch.setattr(train, "DATA", tmp_path)
    monkeypatch.setattr(train, "run", parse)
    monkeypatch.setattr(train, "_publish_part", lambda *_: None)
    monkeypatch.setattr(train, "save_mean", lambda *_: None)
    monkeypatch.setattr(make_data, "write_training", lambda *_: None)
    monkeypatch.setattr(train.glimpse_data, "write", lambda *_, **__: None)
    for name in ("finetune", "twig", "glimpse", "twig_plus"):
        train.STAGES[name](Namespace(steps=None))
    assert ran == [*classes, "llava.train.train_twigvlm_plus"]


def test_the_mean_of_two_files_of_weights_is_their_mean(tmp_path):
    one, other = (torch.randn(3, 4).bfloat16() for _ in range(2))
    save_file({"w": one}, tmp_path / "one")
    save_file({"w": other}, tmp_path / "other")
    train.save_mean(tmp_path / "one", tmp_path / "other", tmp_path / "mean")
    mean = load_file(tmp_path / "mean")["w"]
    assert torch.equal(mean, ((one.float() + other.float()) / 2).bfloat16())


# Tokenizer -----------------------------------------------------------------------------------


def test_the_shipped_tokenizer_is_the_built_one_and_splits_digits():
    assert (LLAVA / "tokenizer.model").read_bytes() == tokenizer.build()
    slow = LlamaTokenizer.from_pretrained(LLAVA)
    assert slow.tokenize("[0.12, 0.34]") == ["▁[0.", "1", "2", ",▁0.", "3", "4", "]"]
    assert slow.decode(slow("The red star: 42?").input_ids[1:]) == "The red star: 42?"
    assert (slow.unk_token_id, slow.bos_token_id, slow.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("seed", range(5))
def test_fast_training_reads_the_same_ids_as_the_real_prompt(seed):
    slow = LlamaTokenizer.from_pretrained(LLAVA)
    for question in questions.ask(scenes.make_scene(seed), np.random.default_rng(seed)):
        text = f"{decoder_text.SYSTEM}<image>\n{question.text} ASSISTANT: {question.answer}"
        ids = tokenizer_image_token(text, slow)
        fast, _ = decoder_text.turn_ids(question)
        assert ids == [*decoder_text.prefix_ids(), -200, *fast[:-1]]


def test_clip_phrases_are_encoded_as_by_the_shipped_tokenizer():
    published = CLIPTokenizer.from_pretrained(TOWER)
    pairs = [("red", "star"), ("cyan", "ladder")]
    ids = published("a red star and a cyan ladder").input_ids
    assert clip_files.phrase_ids(pairs)[: len(ids)].tolist() == ids


# Checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    model, info = CLIPModel.from_pretrained(TOWER, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


def test_the_tower_in_transformers_gives_the_features_of_training(clip):
    seeds = range(HELD_OUT, HELD_OUT + 2)
    fused = fast_train.tower_features(fast_train.load_tower(TOWER), seeds).float()
    pictures = [scenes.render(scenes.make_scene(seed)) for seed in seeds]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    pixels = (pixels - tower.MEAN[:, None, None]) / tower.STD[:, None, None]
    with torch.no_grad():
        states = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert (states - fused).abs().mean() < 0.02 * states.abs().mean()


def test_the_class_token_pairs_pictures_with_captions(clip):
    indices = range(6)
    names = [scenes.make_scene(HELD_OUT + i).things[:2] for i in indices]
    ids = torch.from_numpy(
        np.stack([clip_files.phrase_ids([(t.color, t.kind) for t in pair]) for pair in names])
    )
    processed = [scenes.render(scenes.make_scene(HELD_OUT + i)) for i in indices]
    pixels = torch.from_numpy(np.stack(processed)).permute(0, 3, 1, 2) / 255
    pixels = (pixels - tower.MEAN[:, None, None]) / tower.STD[:, None, None]
    with torch.no_grad():
        logits = clip(input_ids=ids, pixel_values=pixels).logits_per_image
    assert (logits.argmax(-1) == torch.arange(6)).sum() >= 5


def test_the_shipped_llava_answers_questions_about_held_out_pictures():
    slow, model, processor, _ = load_pretrained_model(str(LLAVA), None, LLAVA.name, device="cpu")
    right = 0
    for index in range(12):
        scene = make_data.held_out(index)
        question = questions.existence(scene, np.random.default_rng(index))
        image = Image.fromarray(scenes.render(scene))
        pixels = process_images([image], processor, model.image_settings).to(model.dtype)
        text = f"{decoder_text.SYSTEM}<image>\n{question.text} ASSISTANT:"
        ids = tokenizer_image_token(text, slow, return_tensors="pt")[None]
        with torch.inference_mode():
            out = model.generate(
                ids, images=pixels, image_sizes=[image.size], do_sample=False, max_new_tokens=5
            )
        right += slow.decode(out[0], skip_special_tokens=True).strip() == question.answer
    assert right >= 10


def test_checkpoints_stay_small():
    weights = [*TOWER.glob("*.safetensors"), *LLAVA.glob("*.safetensors")]
    assert sum(path.stat().st_size for path in weights) <= 40e6
