"""The playground's reinforcement: which questions it asks, and the curve it draws."""

import json

import pytest
import yaml
from PIL import Image

from playground.train_plus import draw, rewards, running_mean, write_questions


def test_the_hard_questions_are_rewarded_for_the_right_text(tmp_path):
    source = write_questions(tmp_path, pictures=2)
    (entry,) = yaml.safe_load(source.read_text())["datasets"]
    assert entry["score_funcs"] == ["precision_match"]
    rows = [json.loads(line) for line in open(entry["json_path"])]
    everything = (tmp_path / "boxes.jsonl").read_text().splitlines()
    assert 0 < len(rows) < len(everything)
    for row in rows:
        assert row["question"].startswith(("How many", "Are there")) and row["bboxs"]
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
