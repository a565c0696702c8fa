"""Decoding speed and throughput of models whose images have grids of their own."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from llava.eval.efficiency import decode_speed, throughput
from llava.eval.efficiency.random_model import build_random_model, shapes
from llava.pruning.twigvlm import grow_twig, save_twig
from tests.paths import GOLDEN

SMALL = GOLDEN / "tiny-qwen2.5-vl-cut"
LAYERS = 6
BOUND = ["--max-pixels", str(40 * 28 * 28), "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder in the layout of the release, with random weights and more layers."""
    folder = tmp_path_factory.mktemp("qwen") / "model"
    shutil.copytree(SMALL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = build_random_model(*shapes(str(SMALL), LAYERS))
    model.save_pretrained(folder)
    return folder, model


def test_every_way_of_decoding_a_checkpoint_is_measured(checkpoint, tmp_path, capsys):
    folder, model = checkpoint
    save_twig(str(tmp_path / "twig"), grow_twig(model, 1, 2).state_dict(), 1, str(folder))
    words = ["--model-path", str(folder), "--limit", "1", "--max-new-tokens", "6", *BOUND]
    words += ["--methods", "twigvlm", "--pruning-arg", f"twigvlm.twig={tmp_path / 'twig'}"]
    words += ["--visual-token-num", "18"]
    result = decode_speed.main(words)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["dense", "twigvlm", "twigvlm, no guesses", "twigvlm, guessing"]
    assert rows["twigvlm, guessing"]["same_answers"] == 100
    assert rows["twigvlm, no guesses"]["same_answers"] == 100
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


def throughput_of(monkeypatch, path, *words: str) -> dict:
    argv = ["throughput", *words, "--images", "2", "--per-image", "3", "--batch-size", "2"]
    monkeypatch.setattr(sys, "argv", [*argv, "--max-new-tokens", "2", *BOUND, "--json", str(path)])
    throughput.main()
    return json.loads(path.read_text())


@pytest.mark.parametrize("random", [False, True], ids=["checkpoint", "random weights"])
def test_questions_per_second_of_every_way(checkpoint, tmp_path, monkeypatch, random):
    model = ["--config", str(SMALL), "--layers", "3"] if random else ["--model-path"]
    model += [] if random else [str(checkpoint[0])]
    words = [*model, "--methods", "none", "divprune", "--visual-token-num", "9"]
    speeds = throughput_of(monkeypatch, tmp_path / "out.json", *words)["speeds"]
    ways = [throughput.PLAIN, throughput.BATCHED, throughput.REUSED]
    assert [(s["method"], s["way"]) for s in speeds] == [
        (method, way) for method in ("none", "divprune") for way in ways
    ]
    assert all(speed["per_second"] > 0 for speed in speeds)


def test_layers_are_for_random_weights(checkpoint, monkeypatch, capsys):
    argv = ["throughput", "--model-path", str(checkpoint[0]), "--layers", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        throughput.parse_args()
    assert "--layers is for random weights" in capsys.readouterr().err
