"""What decides the answers of a run is recorded; when any of it changes, a resume is refused."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import llava
from llava.eval.answering.answers_file import AnswersFile
from llava.eval.answering.settings import settings_of
from llava.eval.files import fingerprints
from llava.eval.files.fingerprints import fingerprint
from llava.pruning import build_pruner
from tests.paths import GOLDEN

HEADS = [{"question_id": 0}, {"question_id": 1}]


@pytest.fixture
def args(tmp_path):
    """Options of a run with a checkpoint and its tower, both copies."""
    for name in ("tiny-llava-v1.5", "tiny-clip-vit-l14-336"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    return SimpleNamespace(
        model_path=str(tmp_path / "tiny-llava-v1.5"),
        model_name="tiny-llava-v1.5",
        model_base=None,
        conv_mode="vicuna_v1",
        temperature=0.0,
        dtype=None,
        device="cpu",
        batch_size=4,
        answers_file="a.jsonl",
        skip_bad=False,
    )


def tower_of(args) -> str:
    config = json.loads(Path(args.model_path, "config.json").read_text())
    return os.path.normpath(os.path.join(args.model_path, config["mm_vision_tower"]))


def resumed(args, tmp_path, change, pruner=None):
    """What a run says that continues another one after `change`; None: it goes on."""
    path = str(tmp_path / "out" / "a.jsonl")
    with AnswersFile(path, HEADS, settings_of(args, pruner or build_pruner()), True) as file:
        file.put(0, {"question_id": 0, "text": "x"})
    change(args)
    try:
        with AnswersFile(path, HEADS, settings_of(args, build_pruner())):
            return None
    except ValueError as error:
        return str(error)


def edit(folder, name, **values):
    path = Path(folder, name)
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def set_options(**values):
    return lambda args: vars(args).update(values)


CHANGES = {
    "config": (
        lambda a: edit(a.model_path, "config.json", rope_theta=5e5),
        "config.rope_theta was",
    ),
    "generation": (
        lambda a: edit(a.model_path, "generation_config.json", repetition_penalty=1.5),
        "generation_config",
    ),
    "template": (set_options(conv_mode="llava_v0"), "conv_mode was 'vicuna_v1' and is now"),
    "dtype": (set_options(dtype="bf16"), "dtype was 'float32' and is now 'bfloat16'"),
    "temperature": (set_options(temperature=0.5), "temperature was 0.0 and is now 0.5"),
    "quantization": (set_options(load_4bit=True), "load_4bit was None and is now True"),
    "attention": (set_options(attn_implementation="eager"), "attn_implementation was"),
    "an option of tomorrow": (set_options(upright_photos=True), "upright_photos was None and is"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_resume_after_a_change_is_refused_and_the_change_named(name, args, tmp_path):
    change, sentence = CHANGES[name]
    assert sentence in resumed(args, tmp_path, change)


def test_another_version_of_the_package_is_refused(args, tmp_path, monkeypatch):
    change = lambda _: monkeypatch.setattr(llava, "__version__", "9.9")  # noqa: E731
    assert "and is now '9.9'" in resumed(args, tmp_path, change)


@pytest.mark.parametrize("whose", ["model", "tower"])
def test_changed_weights_are_refused(whose, args, tmp_path):
    folder = args.model_path if whose == "model" else tower_of(args)
    path = next(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".bin"))

    def change(_):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    sentence = "weights was" if whose == "model" else "tower.weights was"
    assert sentence in resumed(args, tmp_path, change)


def test_a_changed_tokenizer_or_preparation_of_images_is_refused(args, tmp_path):
    def change(args):
        edit(args.model_path, "tokenizer_config.json", add_bos_token=False)
        edit(tower_of(args), "preprocessor_config.json", image_mean=[0.0, 0.0, 0.0])

    said = resumed(args, tmp_path, change)
    assert "tokenizer was" in said and "tower.preprocessor_config" in said


def test_what_changes_no_answer_is_not_guarded(args, tmp_path):
    def change(args):
        vars(args).update(batch_size=1, answers_file="b.jsonl", skip_bad=True, workers=9)
        edit(args.model_path, "config.json", transformers_version="4.0", _name_or_path="/x")
        Path(args.model_path, "README.md").write_text("new")

    assert resumed(args, tmp_path, change) is None


def test_a_broken_config_is_named(args):
    Path(args.model_path, "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json, line 1: not valid JSON"):
        settings_of(args, build_pruner())


def test_a_change_anywhere_in_a_large_file_of_many_tensors_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(fingerprints, "STRIDE", 5000)
    monkeypatch.setattr(fingerprints, "BLOCK", 100)
    path = tmp_path / "model.safetensors"
    content = bytearray(100_000)
    path.write_bytes(content)
    before = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == before
    content[40_000:46_000] = b"x" * 6_000  # a matrix that was trained
    path.write_bytes(content)
    assert fingerprint(str(tmp_path)) != before


def test_a_name_on_the_hub_is_its_own_fingerprint(args):
    args.model_path = "liuhaotian/llava-v1.5-7b"
    found = settings_of(args, build_pruner())
    assert found["weights"] == "liuhaotian/llava-v1.5-7b" and found["dtype"] is None
