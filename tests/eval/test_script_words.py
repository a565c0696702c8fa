"""Words and settings of the benchmark scripts that more than one program must know of."""

import json
import shutil
from pathlib import Path

import pytest

from llava.eval import mask_report, score_table
from llava.eval.answering.script_args import limit_among, refuse_own_words
from llava.eval.benchmarks import data_files, find_benchmark
from llava.eval.files.answer_places import run_of
from llava.eval.score import elsewhere
from llava.pruning.cli import parse_pair
from tests.paths import ROOT


def test_a_limit_among_the_words_is_told_to_scoring_too():
    assert limit_among(["--limit", "4", "--skip-bad"]) == (4, ["--skip-bad"])
    assert limit_among(["--skip-bad"]) == (None, ["--skip-bad"])
    assert limit_among(["--num_samples=4"]) == (4, [])  # as GlimpsePrune's release calls it


OWN_WORDS = ("--num-chunks", "--chunk_idx=1", "--answers-file=A.jsonl", "--questions-file")
OWN_WORDS += ("--brief", "--do_func_name")


@pytest.mark.parametrize("word", OWN_WORDS)
def test_what_a_script_sets_itself_is_refused_with_what_to_set_instead(word):
    with pytest.raises(ValueError, match="is set by the script itself: "):
        refuse_own_words(["--skip-bad", word])


@pytest.mark.parametrize("text", ["2024_10", "1_0.5"])
def test_a_number_with_underscores_is_the_name_of_a_folder(text):
    assert parse_pair(f"twig={text}") == ("twig", text)
    assert parse_pair("layer=12") == ("layer", 12)


def test_a_file_that_is_called_answers_is_not_the_folder_of_that_name():
    assert elsewhere("/data/answers.jsonl", "reviews", ".jsonl") == "/data/answers.reviews.jsonl"
    inside = elsewhere("/data/answers/val/answers.jsonl", "reviews", ".jsonl")
    assert inside == "/data/reviews/val/answers.jsonl"


def score_file(folder: Path, method: str, benchmark: str, score: float) -> str:
    path = folder / "viscot/answers" / benchmark / "model" / method / "n_64.score.json"
    path.parent.mkdir(parents=True)
    fields = {"benchmark": benchmark, "metric": "mean", "score": score, "count": 2}
    path.write_text(json.dumps(fields))
    return str(path)


def test_scores_of_two_methods_have_their_own_rows_and_means(tmp_path, capsys, monkeypatch):
    names = {("random", "viscot_gqa"): 20, ("random", "viscot_cub"): 40}
    names |= {("fastv", "viscot_gqa"): 60, ("fastv", "viscot_cub"): 80}
    paths = [score_file(tmp_path, *name, score) for name, score in names.items()]
    monkeypatch.setattr("sys.argv", ["score_table", *paths])
    score_table.main()
    *table, last = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")][:4] for line in table]
    for method, mean in (("random", "30.00"), ("fastv", "70.00")):
        assert [f"model/{method}/n_64", "viscot, mean", "mean", mean] in rows
    assert json.loads(last)["model/fastv/n_64"] == {"viscot_gqa": 60, "viscot_cub": 80}


def test_kept_tokens_of_two_methods_have_their_own_means(monkeypatch):
    values = dict.fromkeys(mask_report.COLUMNS.values(), 0.5) | {"count": 2}
    numbers = {"a": 0.2, "b": 0.4}
    monkeypatch.setattr(mask_report, "read_answers", lambda path: path)
    monkeypatch.setattr(
        mask_report.box_counts,
        "summarize",
        lambda path: {**values, "mIoU": numbers[path.split("/")[-2]]},
    )
    paths = [f"d/viscot/answers/{name}/model/{m}/n.jsonl" for m in numbers for name in ("x", "y")]
    found = mask_report.summaries(paths)
    assert len(found) == 6 and found["model/a/n, mean"]["mIoU"] == pytest.approx(0.2)
    assert found["model/b/n, mean"]["count"] == 4
    assert run_of("elsewhere/a.jsonl") == "elsewhere/a"
    assert list(mask_report.summaries(paths[:2])) == ["x", "y", "mean"]


def test_questions_of_the_hidden_split_ask_for_what_its_server_needs(tmp_path):
    folder = tmp_path / "vqav2"
    (folder / "test2015").mkdir(parents=True)
    line = {"question_id": 1, "image": "COCO_test2015_000000000001.jpg", "text": "Who?"}
    name = "llava_vqav2_mscoco_test-dev2015.jsonl"
    (folder / name).write_text(json.dumps(line) + "\n")
    (folder / "test2015" / line["image"]).touch()
    benchmark = find_benchmark("vqav2")
    for truth in ((), benchmark.truth):  # with and without the answers to another split
        for own in truth:
            (tmp_path / own).touch()
        with pytest.raises(FileNotFoundError, match="test2015.jsonl") as error:
            data_files.check(benchmark, str(tmp_path))
        assert "annotations" not in str(error.value).partition("from")[0]
    shutil.copy(folder / name, folder / "llava_vqav2_mscoco_test2015.jsonl")
    data_files.check(benchmark, str(tmp_path))


@pytest.mark.parametrize("name", ["viscot_gqa", "seed", "mme", "pope"])
def test_images_are_looked_for_before_the_first_answer(name, tmp_path):
    benchmark = find_benchmark(name)
    source, _ = data_files.find(benchmark)
    for own in (benchmark.questions, *benchmark.truth):
        target = tmp_path / own
        target.parent.mkdir(parents=True, exist_ok=True)
        whole = ROOT / source / own
        copy = shutil.copytree if whole.is_dir() else shutil.copy
        if not target.exists():
            copy(whole, target)
    (tmp_path / (benchmark.images or "")).mkdir(parents=True, exist_ok=True)
    with pytest.raises(FileNotFoundError, match=r"\.(png|jpg|webp)\n"):
        data_files.check(benchmark, str(tmp_path))


def test_an_unknown_split_is_told_those_of_its_benchmark():
    with pytest.raises(ValueError, match="'testZ' of refcoco, choose from testA, testB, or name"):
        find_benchmark("refcoco_testZ")
    assert find_benchmark("refcoco_val") is find_benchmark("refcoco")
