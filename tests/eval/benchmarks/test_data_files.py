"""Data of the benchmarks: found, or named with its source; converters into question files."""

import json
import os
import pickle
import subprocess
import sys

import pytest

from llava.eval.benchmarks import all_benchmarks, data_files, find_benchmark
from playground import make_samples
from tests.eval import mini_benchmark
from tests.paths import ROOT


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def convert(script, *argv):
    command = [sys.executable, ROOT / "scripts" / f"{script}.py", *map(str, argv)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")


ALL = all_benchmarks()


@pytest.mark.parametrize("name", ALL)
def test_every_needed_file_has_a_source(name, tmp_path):
    for path in data_files.needed(ALL[name], str(tmp_path)):
        assert any(path.startswith(start) for start in ALL[name].sources)
        assert ALL[name].source_of(path) in ALL[name].sources.values()
    assert ALL[name].source_of("elsewhere/x") == "the authors of the benchmark"


def has_samples(name):
    """Two of the twelve sets of Visual-CoT show its format; one Chinese file that of Q-Bench."""
    shown = not name.startswith("viscot") or name.split("_")[1] in ("gqa", "textvqa")
    return shown and name != "qbench_zh_test"


@pytest.mark.parametrize("name", [name for name in ALL if has_samples(name)])
def test_every_benchmark_has_questions_in_the_repository_and_a_program(name, monkeypatch, capsys):
    monkeypatch.setattr(data_files, "DEFAULT_DIR", "nowhere")
    folder, images = data_files.find(ALL[name])
    assert "using the playground's questions" in capsys.readouterr().err
    questions = ALL[name].select(ALL[name].read(os.path.join(folder, ALL[name].questions)))
    assert len(questions) >= 8
    for question in questions:
        for image in question.images:
            assert question.base64 or os.path.exists(os.path.join(images, image))
    assert (ROOT / f"llava/eval/{ALL[name].program[0]}.py").exists()


def test_the_samples_in_the_repository_are_those_of_their_generator(tmp_path):
    make_samples.write_samples(tmp_path)
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    shipped = ROOT / "playground/samples"
    assert written == sorted(path.relative_to(shipped) for path in shipped.rglob("*.*"))
    for name in written:
        assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes(), name


def test_real_data_are_taken_before_the_playgrounds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_files, "DEFAULT_DIR", str(mini_benchmark.build(tmp_path)))
    assert data_files.find(ALL["pope"])[0] == str(tmp_path)
    assert not capsys.readouterr().err
    assert set(data_files.present()) == set(mini_benchmark.NAMED)


def test_a_missing_image_folder_or_answer_file_is_named_with_its_source(tmp_path):
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa/llava_gqa_testdev_balanced.jsonl").touch()
    with pytest.raises(FileNotFoundError) as raised:
        data_files.find(ALL["gqa"], str(tmp_path))
    text = str(raised.value)
    assert "gqa/data/images\n" in text and "gqa/data/testdev_balanced_questions.json\n" in text
    assert "llava_gqa_testdev" not in text and text.count("from https://cs.stanford.edu") == 2


def test_answers_of_a_hidden_split_need_no_truth_here(tmp_path):
    (tmp_path / "vqav2").mkdir()
    names = ("llava_vqav2_mscoco_test-dev2015.jsonl", "llava_vqav2_mscoco_test2015.jsonl")
    for name in names:
        (tmp_path / "vqav2" / name).touch()
    benchmark = ALL["vqav2"]
    assert benchmark.server_scored(str(tmp_path)) and not benchmark.scorable(str(tmp_path))
    assert data_files.needed(benchmark, str(tmp_path)) == [benchmark.questions, "vqav2/test2015"]
    (tmp_path / "vqav2" / names[1]).unlink()
    (tmp_path / "vqav2/v2_mscoco_val2014_annotations.json").touch()
    assert benchmark.scorable(str(tmp_path)) and not benchmark.has_upload(str(tmp_path))


def test_a_benchmark_is_found_by_its_name_with_or_without_its_usual_split():
    assert find_benchmark("refcoco_val") is find_benchmark("refcoco") is ALL["refcoco"]
    assert find_benchmark("vizwiz_val") is not find_benchmark("vizwiz")
    with pytest.raises(ValueError, match="unknown benchmark 'mmstar', choose from pope, "):
        find_benchmark("mmstar")


def test_vizwiz_annotations_become_questions_with_the_published_wording(tmp_path):
    records = [{"image": "VizWiz_val_00000000.jpg", "question": "What is this?", "answers": []}]
    (tmp_path / "val.json").write_text(json.dumps(records))
    target = tmp_path / "vizwiz/llava_val.jsonl"
    argv = ("--annotation-file", tmp_path / "val.json", "--dst", target)
    assert convert("convert_vizwiz_to_llava", *argv).returncode == 0
    assert json.loads(target.read_text()) == {
        "question_id": 0,
        "image": "VizWiz_val_00000000.jpg",
        "text": "What is this?\nWhen the provided information is insufficient, respond with "
        "'Unanswerable'.\nAnswer the question using a single word or phrase.",
        "category": "default",
    }


def test_vqav2_questions_get_the_file_names_of_coco(tmp_path):
    question = {"image_id": 42, "question": "How many?", "question_id": 42001}
    content = {"data_subtype": "val2014", "questions": [question]}
    (tmp_path / "q.json").write_text(json.dumps(content))
    target = tmp_path / "out.jsonl"
    assert not convert(
        "convert_vqav2_to_llava", "--src", tmp_path / "q.json", "--dst", target
    ).stderr
    record = json.loads(target.read_text())
    assert record["image"] == "COCO_val2014_000000000042.jpg" and record["question_id"] == 42001
    assert record["text"] == "How many?\nAnswer the question using a single word or phrase."


@pytest.fixture
def refer_dir(tmp_path):
    folder = tmp_path / "refer/refcoco"
    folder.mkdir(parents=True)
    sentences = [{"sent_id": 5, "sent": "left dog"}, {"sent_id": 6, "sent": "the dog."}]
    refs = [
        {"ref_id": 0, "ann_id": 9, "image_id": 3, "split": "testA", "sentences": sentences},
        {"ref_id": 1, "ann_id": 9, "image_id": 3, "split": "train", "sentences": sentences},
    ]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    instances = {
        "images": [{"id": 3, "file_name": "COCO_train2014_3.jpg", "width": 640, "height": 480}],
        "annotations": [{"id": 9, "bbox": [10.5, 20, 100, 50]}],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    return folder.parent


def test_refer_annotations_become_one_question_per_description(refer_dir, tmp_path):
    argv = ("--refer-dir", refer_dir, "--dataset", "refcoco", "--dst", tmp_path / "out")
    assert convert("convert_refcoco_to_llava", *argv, "--split", "testA").returncode == 0
    read = lambda name: [  # noqa: E731
        json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()
    ]
    questions, boxes = read("llava_refcoco_testA.jsonl"), read("refcoco_testA.jsonl")
    assert [q["question_id"] for q in questions] == [5, 6]
    assert questions[1]["text"].endswith("this sentence describes: the dog.")
    assert questions[0]["image"] == "COCO_train2014_3.jpg"
    assert boxes[0] == {
        "question_id": 5,
        "bbox": [10.5, 20, 110.5, 70],
        "width": 640,
        "height": 480,
    }
    done = convert("convert_refcoco_to_llava", *argv, "--split", "testC")
    assert done.returncode == 1 and "no split 'testC', only ['testA', 'train']" in done.stderr


def test_a_pickle_that_would_run_code_is_refused(refer_dir, tmp_path):
    (refer_dir / "refcoco/refs(unc).p").write_bytes(pickle.dumps(print))
    argv = ("--refer-dir", refer_dir, "--dataset", "refcoco", "--split", "val", "--dst", tmp_path)
    done = convert("convert_refcoco_to_llava", *argv)
    assert done.returncode == 1 and "wants to load builtins.print" in done.stderr


def test_annotations_that_are_cut_off_are_named(refer_dir, tmp_path):
    path = refer_dir / "refcoco/refs(unc).p"
    path.write_bytes(path.read_bytes()[:2])
    argv = ("--refer-dir", refer_dir, "--dataset", "refcoco", "--split", "val", "--dst", tmp_path)
    done = convert("convert_refcoco_to_llava", *argv)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {path} is not a REFER annotation")
