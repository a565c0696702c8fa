"""The playground's reinforcement: which questions it asks, and the curve it draws."""

import json

import pytest
import yaml
from PIL import Image

from llava.train.reinforcement.rewards import check_score_funcs
from playground.train_plus import draw, rewards, running_mean, write_questions

BEGINNINGS = {"counting": ("How many", "Are there"), "boxes": ("Please provide the bounding",)}
REWARDS = {"counting": "precision_match", "boxes": "share_box_iou"}


@pytest.mark.parametrize("kinds", [["counting"], ["boxes"], ["counting", "boxes"]])
def test_a_kind_of_question_has_its_own_reward(tmp_path, kinds):
    write_questions(tmp_path, pictures=2, kinds=kinds)  # a run that is continued writes again
    source = write_questions(tmp_path, pictures=2, kinds=kinds)
    entries = yaml.safe_load(source.read_text())["datasets"]
    assert [entry["score_funcs"] for entry in entries] == [[REWARDS[kind]] for kind in kinds]
    for kind, entry in zip(kinds, entries, strict=True):
        rows = [json.loads(line) for line in open(entry["json_path"])]
        assert rows
        for row in rows:
            assert row["question"].startswith(BEGINNINGS[kind]) and row["bboxs"]
            check_score_funcs(entry["score_funcs"], row["answer"], entry["json_path"])
            assert (tmp_path / "cot" / row["dataset"] / row["image"]).exists()


def test_the_curve_is_that_of_the_run(tmp_path):
    history = [{"reward": 0.25, "loss": 1}, {"train_loss": 2}, {"reward": 0.75, "loss": 1}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    values = rewards(tmp_path)
    assert values == [0.25, 0.75]
    assert running_mean([1.0, 2.0, 3.0, 4.0], window=2) == [1.0, 1.5, 2.5, 3.5]
    pytest.importorskip("matplotlib")
    draw(values, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").width == 720
