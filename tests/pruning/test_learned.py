"""Trained parts of methods: reading, checking against the model, writing."""

import json

import pytest
import torch
from torch import nn

from llava import playground
from llava.pruning.learned import (
    build_part,
    part_folder,
    read_part,
    read_part_config,
    save_part,
)


def small():
    return nn.Sequential(nn.Linear(3, 2, bias=False), nn.LayerNorm(2))


def tensors():
    return {key: torch.rand_like(value) for key, value in small().state_dict().items()}


def test_a_part_comes_back_as_it_was_saved(tmp_path):
    saved = tensors()
    save_part(str(tmp_path), "magic", saved, base_model=str(tmp_path), depth=3)
    config = read_part_config(str(tmp_path), "magic")
    assert config == {"pruning_method": "magic", "base_model": tmp_path.name, "depth": 3}
    path, loaded = read_part(str(tmp_path))
    module = build_part(small, loaded, path, like=torch.zeros(1, dtype=torch.bfloat16))
    assert all(p.dtype == torch.bfloat16 for p in module.parameters())
    assert not any(p.requires_grad for p in module.parameters()) and not module.training
    for key, value in module.state_dict().items():
        assert torch.equal(value, saved[key].bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("1.bias"), "lacks 1 weights, 1.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "holds 1 weights that have no place, extra"),
        (
            lambda t: t.update({"0.weight": torch.zeros(5, 2)}),
            r"\(5, 2\), the model needs",
        ),
    ],
)
def test_a_part_that_does_not_fit_is_refused(change, message):
    wrong = tensors()
    change(wrong)
    with pytest.raises(ValueError, match=message):
        build_part(small, wrong, "some/file", like=torch.zeros(1))


def test_the_part_of_another_method_is_refused(tmp_path):
    save_part(str(tmp_path), "magic", tensors(), base_model="x")
    with pytest.raises(ValueError, match="a trained part of 'magic', not of 'other'"):
        read_part_config(str(tmp_path), "other")


def test_published_files_are_read_in_order_and_nested_dicts_are_flattened(tmp_path):
    nested = {"table": torch.arange(3.0), "fuser": {"in.weight": torch.ones(2)}}
    torch.save(nested, tmp_path / "published.pt")
    path, loaded = read_part(str(tmp_path), ("model.safetensors", "published.pt"))
    assert path.endswith("published.pt") and set(loaded) == {"table", "fuser.in.weight"}
    assert read_part_config(str(tmp_path), "magic") == {}
    with pytest.raises(FileNotFoundError, match="looked for model.safetensors"):
        read_part(str(tmp_path))


def test_a_file_that_could_run_code_is_refused(tmp_path):
    torch.save({"table": pytest.approx(1.0)}, tmp_path / "published.pt")
    with pytest.raises(ValueError, match="could run code"):
        read_part(str(tmp_path), ("published.pt",))


def test_without_a_folder_only_the_playground_model_has_a_part(tmp_path, monkeypatch):
    monkeypatch.setattr(playground, "ROOT", tmp_path)
    checkpoint = tmp_path / playground.CHECKPOINT
    part = tmp_path / "checkpoints" / "magic-plus-playground"
    checkpoint.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="magic_plus needs a trained part.*spell=FOLDER"):
        part_folder("magic_plus", None, str(checkpoint), "spell")
    part.mkdir()
    assert part_folder("magic_plus", None, str(checkpoint), "spell") == str(part)
    with pytest.raises(FileNotFoundError, match="train one with python -m .*train_magic_plus"):
        part_folder("magic_plus", None, str(tmp_path), "spell")
    assert part_folder("magic_plus", str(tmp_path), "anything", "spell") == str(tmp_path)
    (part / "config.json").write_text(json.dumps({}))
    assert read_part_config(str(part), "magic_plus") == {}
