"""Boxes of the playground: what a question needs."""

import json

import numpy as np
import pytest

from llava.train.glimpse.data import read_datasets
from playground.glimpse_data import needed, records, write
from playground.questions import ask
from playground.scenes import IMAGE_SIZE, Scene, Sign, Thing, make_scene

RED_STAR = Thing("red", "star", (10, 10, 40, 40))
RED_BALL = Thing("red", "ball", (60, 10, 90, 40))
BLUE_BALL = Thing("blue", "ball", (110, 10, 140, 40))
SIGN = Sign("green", "cat", (10, 100, 60, 130))
WHOLE = (0, 0, IMAGE_SIZE, IMAGE_SIZE)
SCENE = Scene(0, (RED_STAR, RED_BALL, BLUE_BALL), (SIGN,))


class Asked:
    def __init__(self, bare, task):
        self.bare, self.task = bare, task


@pytest.mark.parametrize(
    ("text", "task", "items"),
    [
        ("Is there a red star in the image?", "existence", [RED_STAR]),
        ("Is there a blue star in the image?", "existence", [RED_STAR, BLUE_BALL]),
        ("Is there a white net in the image?", "existence", [RED_STAR, RED_BALL, BLUE_BALL]),
        ("What color is the star?", "attribute", [RED_STAR]),
        ("What is the blue thing?", "attribute", [BLUE_BALL]),
        ("Is the star blue?", "statement", [RED_STAR]),
        ("Is the red star left of the blue ball?", "relation", [RED_STAR, BLUE_BALL]),
        ("How many balls are there?", "counting", [RED_BALL, BLUE_BALL]),
        ("How many red things are there?", "counting", [RED_STAR, RED_BALL]),
        ("What is written on the sign?", "reading", [SIGN]),
        ("Describe the image.", "description", [RED_STAR, RED_BALL, BLUE_BALL, SIGN]),
    ],
)
def test_a_question_needs_what_it_names(text, task, items):
    assert needed(SCENE, Asked(text, task)) == [item.box for item in items]


@pytest.mark.parametrize("text", ["How many things are there?", "Are there 4 things in the image?"])
def test_a_question_about_all_things_needs_the_whole_picture(text):
    assert needed(SCENE, Asked(text, "counting")) == [WHOLE]


def test_every_question_of_the_mix_needs_something_but_never_everything_it_does_not_name():
    for seed in range(20):
        scene = make_scene(seed)
        for question in ask(scene, np.random.default_rng(seed)):
            boxes = needed(scene, question)
            items = {item.box for item in (*scene.things, *scene.signs)}
            assert boxes == [WHOLE] or (boxes and set(boxes) <= items)
            if question.task == "attribute":
                assert len(boxes) == 1


def test_the_written_lines_are_read_by_the_training(tmp_path):
    write(tmp_path, pictures=2, per_picture=3)
    samples = read_datasets(str(tmp_path / "boxes.jsonl"), str(tmp_path), 42)
    assert len(samples) == 6
    before = (tmp_path / "boxes.jsonl").read_text()
    write(tmp_path, pictures=1, per_picture=1)  # complete: left as it is
    assert (tmp_path / "boxes.jsonl").read_text() == before
    first = json.loads(before.splitlines()[0])
    assert first == json.loads(json.dumps(records(2_000_000, first["image"], 1)[0]))
