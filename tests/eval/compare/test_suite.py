"""The suite and the scripts run every benchmark and score what they wrote."""

import builtins
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava.eval import score
from llava.eval.benchmarks import find_benchmark
from llava.eval.compare import suite, suite_report
from llava.eval.compare.budget import Budget
from llava.eval.files import records
from llava.eval.files.answer_lines import Answer
from llava.pruning import Pruner, build_pruner
from tests.eval import mini_benchmark
from tests.paths import ROOT

ALWAYS = {"pope": 200 / 3, "textvqa": 0, "gqa": 100, "vqav2": 100, "mme": 25, "refcoco": 0}


class FakeLoop:
    """Says yes to everything, and to options A; counts how often it is asked."""

    def __init__(self):
        self.model = SimpleNamespace(pruner=None)
        self.asked = 0

    def run(self, batches, image_folder):
        for numbers, questions in batches:
            for question in questions:
                assert all(os.path.exists(os.path.join(image_folder, i)) for i in _files(question))
                self.asked += 1
            self.visual_tokens = (64, 64)
            yield numbers, [Answer("A" if "A. red" in q.text else "Yes") for q in questions]


def _files(question):
    return [] if question.base64 else question.images


@pytest.fixture
def args(tmp_path):
    return mini_benchmark.suite_args(
        tmp_path,
        methods=["vispruner", "random"],
        tokens=[576, 64, 16],
        pruning_arg=["vispruner.important_ratio=0.75"],
    )


def test_every_method_and_budget_is_scored_on_every_benchmark(args):
    runs = suite.plan(args, num_tokens=576)
    assert [(run.method, run.budget.tokens) for run in runs] == [
        ("none", 576),
        ("vispruner", 64),
        ("vispruner", 16),
        ("random", 64),
        ("random", 16),
    ]
    assert runs[1].pruner == build_pruner("vispruner", visual_token_num=64, important_ratio=0.75)
    loop, benchmarks = FakeLoop(), suite.available(None, args.data_dir)
    scores = suite.run_all(loop, runs, benchmarks, args)
    assert {s.task for s in scores} == set(mini_benchmark.NAMED)
    assert len(scores) == 5 * len(mini_benchmark.NAMED)
    dense = {score.task: score.percent for score in scores if score.method == "none"}
    assert dense == pytest.approx(ALWAYS | {"mmbench": 100, "sqa": 100})
    asked = loop.asked
    assert suite.run_all(loop, runs, benchmarks, args)[3].percent == scores[3].percent
    assert loop.asked == asked  # a finished suite asks nothing again
    written = json.loads(Path(args.out, "scores.json").read_text())["scores"]
    assert len(written) == len(scores)


@pytest.fixture
def opened(monkeypatch):
    """How often each file of records is opened."""
    count = Counter()

    def counting(path, *args, **kwargs):
        count[os.path.normpath(path)] += 1
        return builtins.open(path, *args, **kwargs)

    monkeypatch.setattr(records, "open", counting, raising=False)
    return count


def test_a_question_file_is_read_once_however_many_settings_there_are(args, opened):
    benchmarks = suite.available(None, args.data_dir)
    suite.run_all(FakeLoop(), suite.plan(args, 576)[:3], benchmarks, args)
    places = {os.path.normpath(os.path.join(args.data_dir, b.questions)) for b in benchmarks}
    assert {place: opened[place] for place in places} == dict.fromkeys(places, 1)


@pytest.mark.parametrize("name", mini_benchmark.NAMED)
def test_scoring_reads_a_question_file_once(name, args, tmp_path, opened, monkeypatch):
    benchmark = find_benchmark(name)
    path = os.path.join(args.data_dir, benchmark.questions)
    questions = benchmark.select(benchmark.read(path))
    lines = [json.dumps(question.answer_line("A", "x", "m")) for question in questions]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    argv = ["score", name, "--data-dir", args.data_dir, "--answers-file", str(tmp_path / "a.jsonl")]
    monkeypatch.setattr(sys, "argv", argv)
    opened.clear()
    score.main()
    assert opened[os.path.normpath(path)] == 1


def test_table_and_plot_show_all_methods(args, tmp_path):
    scores = suite.run_all(
        FakeLoop(), suite.plan(args, 576), suite.available(["pope", "gqa"], args.data_dir), args
    )
    text = suite_report.table(scores)
    assert "| task | metric | 576 tokens | 64 tokens | 16 tokens |" in text
    assert "| **average** |  | 83.3 | 83.3 | 83.3 |" in text  # bold is what differs significantly
    assert "| change |  | +0.0 | +0.0 | +0.0 |" in text
    assert text.count("| pope | F1 | 66.7 |") == 2
    pytest.importorskip("matplotlib")
    suite_report.plot(scores, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_an_unknown_option_or_benchmark_is_found_before_anything_runs(args, tmp_path):
    args.pruning_arg = ["random.speed=3"]
    with pytest.raises(ValueError, match="unknown option 'speed'"):
        suite.plan(args, 576)
    with pytest.raises(ValueError, match="has no questions of any benchmark .for example pope/"):
        suite.available(None, str(tmp_path))
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        suite.available(None, str(tmp_path / "nowhere"))
    os.remove(os.path.join(args.data_dir, find_benchmark("sqa").questions))
    with pytest.raises(ValueError, match="has no questions of sqa"):
        suite.available(["pope", "sqa"], args.data_dir)


def test_images_are_looked_for_before_anything_runs(args, capsys):
    shutil.rmtree(os.path.join(args.data_dir, "images"))
    assert [own.name for own in suite.available(None, args.data_dir)] == ["mmbench"]  # inside it
    said = capsys.readouterr().err
    assert "note: pope is left out, as it lacks " in said and "pope/val2014\n" in said
    with pytest.raises(ValueError, match="^gqa lacks .*/gqa/data/images: see playground/data/eval"):
        suite.available(["mmbench", "gqa"], args.data_dir)
    os.remove(os.path.join(args.data_dir, find_benchmark("mmbench").questions))
    with pytest.raises(ValueError, match="pope lacks .*, refcoco lacks "):
        suite.available(None, args.data_dir)


def test_questions_of_a_hidden_split_are_not_asked_to_be_scored_with_other_answers(args, capsys):
    path = Path(args.data_dir, find_benchmark("vqav2").questions)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["image"] = f"COCO_test2015_{number:012}.jpg"
        Path(args.data_dir, "images", line["image"]).touch()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "vqav2" not in {benchmark.name for benchmark in suite.available(None, args.data_dir)}
    assert "vqav2 is left out, as it lacks " in capsys.readouterr().err


def test_a_pair_of_methods_leaves_the_budget_and_its_first_method_twice_as_many(args):
    args.methods, args.tokens = ["none", "vispruner+fastv"], [Budget(64), Budget(share=0.25)]
    args.pruning_arg = ["vispruner+fastv.fastv_layer=3"]
    dense, share, number = suite.plan(args, 576)
    assert (dense.method, share.method) == ("none", "vispruner+fastv")
    first, second = number.pruner.methods
    assert (first.visual_token_num, second.visual_token_num, second.layer) == (128, 64, 3)
    first, second = share.pruner.methods
    assert first.visual_token_ratio * second.visual_token_ratio == share.budget.share
    args.pruning_arg += ["vispruner+fastv.vispruner_visual_token_num=192"]
    args.tokens = [Budget(64)]
    first, second = suite.plan(args, 576)[1].pruner.methods
    assert (first.visual_token_num, second.visual_token_num) == (192, 64)


def test_a_suite_of_which_nothing_runs_is_an_error(args):
    args.methods, args.tokens, args.pruning_arg = ["mustdrop"], [Budget(33)], []
    with pytest.raises(ValueError, match="none of the methods runs here: mustdrop 33: "):
        suite.check_some_run(suite.plan(args, 576))
    args.tokens = []
    suite.check_some_run(suite.plan(args, 576))  # the unpruned model alone


def test_answers_of_another_precision_are_not_taken_for_its_own(args):
    runs, benchmarks = suite.plan(args, 576)[:1], suite.available(["pope"], args.data_dir)
    suite.run_all(FakeLoop(), runs, benchmarks, args)
    args.dtype = "bfloat16"
    with pytest.raises(ValueError, match="dtype was None and is now 'bfloat16'"):
        suite.run_all(FakeLoop(), runs, benchmarks, args)


def test_answers_with_another_trained_part_are_not_taken_for_its_own(args, tmp_path, monkeypatch):
    part = tmp_path / "part"
    part.mkdir()
    monkeypatch.setattr(Pruner, "part_folders", lambda self, path: [str(part)])
    (part / "model.safetensors").write_bytes(b"first")
    runs, benchmarks = suite.plan(args, 576)[:1], suite.available(["pope"], args.data_dir)
    suite.run_all(FakeLoop(), runs, benchmarks, args)
    suite.run_all(FakeLoop(), runs, benchmarks, args)
    (part / "model.safetensors").write_bytes(b"again")  # trained once more, into the same folder
    with pytest.raises(ValueError, match="trained_parts was"):
        suite.run_all(FakeLoop(), runs, benchmarks, args)


def test_incomplete_answers_are_not_scored(args):
    benchmark = find_benchmark("pope")
    path = os.path.join(args.data_dir, benchmark.questions)
    with pytest.raises(ValueError, match="all 2 questions .* there are 1, 1 of them in place"):
        first = benchmark.select(benchmark.read(path))[0].answer_line("Yes", "x", "m")
        benchmark.score(args.data_dir, benchmark.read(path), [first], None)


@pytest.mark.slow
def test_a_benchmark_script_splits_the_work_and_ends_with_the_score(tmp_path):
    data = mini_benchmark.build(tmp_path / "data")
    command = ["bash", "scripts/v1_6/eval/pope.sh", "64", "seed=1"]
    environment = {
        "METHOD": "random",
        "CKPT": str(ROOT / "tests/golden/tiny-llava-v1.5"),
        "DATA_DIR": str(data),
        "NPROC": "2",
        "EXTRA": "--max_new_tokens 4 --device cpu",
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    folder = data / "pope/answers/llava_pope_test/tiny-llava-v1.5/random"
    assert last["answers_file"] == str(folder / "n_64_seed=1.jsonl") and last["count"] == 2
    assert json.loads((folder / "n_64_seed=1.score.json").read_text())["score"] == last["score"]
    assert (folder / "n_64_seed=1.jsonl").read_text().count("\n") == 2


def test_a_script_names_what_is_missing_in_the_data_folder_and_where_to_get_it(tmp_path):
    environment = {**os.environ, "DATA_DIR": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", ROOT / "scripts/v1_5/eval/textvqa.sh", "64"]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    assert f"{tmp_path}/textvqa/train_images\n    from https://dl.fbaipublicfiles" in done.stderr
    assert f"{tmp_path}/textvqa/TextVQA_0.5.1_val.json\n    from https" in done.stderr


def test_a_script_names_the_checkpoint_that_is_not_there(tmp_path):
    environment = {**os.environ, "CKPT_DIR": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", ROOT / "scripts/v1_6/eval/pope.sh", "320"]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    assert f"there is no checkpoint {tmp_path}/llava-v1.6-vicuna-7b" in done.stderr
