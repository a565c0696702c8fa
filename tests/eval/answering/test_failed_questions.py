"""A question that cannot be answered is named; with --skip-bad it is recorded, and counted by no
score."""

import json
import os
import shutil
import sys
import types
from pathlib import Path

import pytest

from llava.eval import score, score_table
from llava.eval.answering.answers_file import AnswersFile, Journal, folder
from llava.eval.answering.loop import AnswerLoop
from llava.eval.answering.questions import Question, jsonl_questions, questions_of
from llava.eval.answering.run import Task, answer_questions
from llava.eval.benchmarks import find_benchmark
from llava.eval.benchmarks import qbench as eval_qbench
from llava.eval.benchmarks import viscot as eval_viscot
from llava.eval.compare import report as compare_report
from llava.eval.compare import suite, suite_report
from llava.eval.compare.budget import Budget
from llava.eval.compare.comparison import AVERAGE, compare_runs
from llava.eval.compare.costs import Cost, sample_prompts
from llava.eval.compare.scores import Run
from llava.eval.files.answer_lines import Failure, NothingAnswered, read_answers
from llava.eval.files.records import Records, read_jsonl
from llava.pruning import build_pruner
from tests.eval import eval_cases, mini_benchmark
from tests.eval.compare.test_suite import FakeLoop
from tests.eval.eval_files import run_scorer, write_lines
from tests.paths import GOLDEN, ROOT

IMAGES = GOLDEN / "images"


class Failing(FakeLoop):
    """Says yes, and fails at the questions with these ids; those of a pruned model are others."""

    conv_mode, max_new_tokens = "vicuna_v1", 8

    def __init__(self, unpruned=(), pruned=()):
        super().__init__()
        self.bad = {True: pruned, False: unpruned}

    def run(self, batches, image_folder):
        for numbers, texts in super().run(batches, image_folder):
            bad = self.bad[self.model.pruner is not None and self.model.pruner.name != "none"]
            pairs = zip(numbers, texts, strict=True)
            yield numbers, [Failure(f"n {n}") if n in bad else t for n, t in pairs]


# --- the loop, with a model ---------------------------------------------------------------------


@pytest.fixture
def program(tmp_path):
    """Runs the answering program on four questions, the third one about a picture that is none."""
    for number in range(3):
        shutil.copy(IMAGES / "img0_336x336.png", tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    names = ["0.png", "1.png", "bad.png", "2.png", "bad.png"]
    lines = [
        json.dumps({"question_id": f"q{n}", "image": name, "text": f"What is {n}?"})
        for n, name in enumerate(names)
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(lines) + "\n")

    def run(*options):
        argv = ["--model-path", GOLDEN / "tiny-llava-v1.5", "--question-file", tmp_path / "q.jsonl"]
        argv += ["--image-folder", tmp_path, "--answers-file", tmp_path / "a.jsonl"]
        argv += ["--temperature", 0, "--max_new_tokens", 3, "--device", "cpu", "--batch-size", 5]
        eval_cases.run_program("llava.eval.model_vqa_loader", [*map(str, argv), *options])
        return [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]

    return run


def test_a_bad_question_is_named_with_file_line_and_id(program, tmp_path):
    with pytest.raises(SystemExit) as stop:
        program()
    assert f"question q2 ({tmp_path}/q.jsonl, line 3)" in stop.value.code
    assert f"{tmp_path}/bad.png" in stop.value.code


@pytest.mark.parametrize("reuse", ["--reuse", "--no-reuse"])
def test_only_the_bad_question_fails_and_its_batch_is_answered(program, tmp_path, capsys, reuse):
    records = program("--skip-bad", reuse)
    assert [("text" in r, "error" in r) for r in records] == [
        (True, False),
        (True, False),
        (False, True),
        (True, False),
        (False, True),
    ]
    assert records[2]["error"].startswith(f"question q2 ({tmp_path}/q.jsonl, line 3): cannot read")
    assert records[4]["error"].startswith(f"question q4 ({tmp_path}/q.jsonl, line 5): cannot read")
    assert "2 of 5 questions failed" in capsys.readouterr().err
    # The others have the answers that they have alone.
    (tmp_path / "q.jsonl").write_text(
        "".join((tmp_path / "q.jsonl").read_text().splitlines(True)[:2])
    )
    alone = program("--overwrite", reuse)
    assert [r["text"] for r in alone] == [r["text"] for r in records[:2]]


def test_failed_questions_are_asked_again_and_answers_kept(program, tmp_path, monkeypatch):
    first = program("--skip-bad")
    shutil.copy(IMAGES / "img0_336x336.png", tmp_path / "bad.png")
    asked = []
    generate = AnswerLoop.generate

    def noting(loop, batch):
        asked.extend(question.head["question_id"] for question, _ in batch)
        return generate(loop, batch)

    monkeypatch.setattr(AnswerLoop, "generate", noting)
    second = program()
    # Their batch is asked as it was; what it had answered stays.
    assert {"q2", "q4"} <= set(asked) and all("text" in record for record in second)
    for number in (0, 1, 3):
        assert second[number] == first[number]
    assert not os.path.exists(folder(str(tmp_path / "a.jsonl")))
    asked.clear()
    assert program() == second and not asked


def test_a_record_that_was_mended_is_asked_and_the_answers_are_kept(program, tmp_path):
    shutil.copy(IMAGES / "img0_336x336.png", tmp_path / "bad.png")
    path = tmp_path / "q.jsonl"
    whole = path.read_text()
    lines = whole.splitlines()
    lines[2] = json.dumps({"question_id": "q2", "image": "bad.png"})
    lines[4] = json.dumps({"image": "bad.png", "text": "What is 4?"})
    path.write_text("\n".join(lines) + "\n")
    first = program("--skip-bad")
    path.write_text(whole)
    second = program()
    assert [record["question_id"] for record in second] == [f"q{n}" for n in range(5)]
    assert all("text" in record for record in second)
    assert [second[n] for n in (0, 1, 3)] == [first[n] for n in (0, 1, 3)]


def test_a_prompt_that_the_model_refuses_is_named_and_the_rest_of_its_batch_answered(
    program, tmp_path, monkeypatch
):
    shutil.copy(IMAGES / "img0_336x336.png", tmp_path / "bad.png")
    generate = AnswerLoop._generate

    def refusing(loop, batch):
        if any(question.head["question_id"] == "q3" for question, _ in batch):
            raise ValueError("the prompt has 9000 tokens, the model takes 2048")
        return generate(loop, batch)

    monkeypatch.setattr(AnswerLoop, "_generate", refusing)
    with pytest.raises(SystemExit) as stop:
        program()
    assert f"question q3 ({tmp_path}/q.jsonl, line 4): the prompt has 9000" in stop.value.code
    records = program("--skip-bad")
    assert [record["question_id"] for record in records if "error" in record] == ["q3"]


# --- records that hold no question --------------------------------------------------------------

BROKEN = [
    ({"question_id": 7, "text": None}, "its text is null"),
    ({"question_id": 7, "text": 5}, "its text is a number"),
    ({"question_id": 7}, "no field 'text'"),
    ({"text": "?"}, "no field 'question_id'"),
    ({"question_id": None, "text": "?"}, "its id is null"),
    ({"question_id": [7], "text": "?"}, "its id is a list"),
    ({"question_id": 7, "text": "?", "image": 5}, "its image is a number"),
    ({"question_id": 7, "text": "?", "image": {"a": "b"}}, "its image is an object"),
    ({"question_id": 7, "text": "?", "image": ["a.png", None]}, "its image is null"),
    ({"question_id": 7, "text": "\ud83d"}, "surrogates not allowed"),
]


@pytest.mark.parametrize("record, reason", BROKEN)
def test_a_record_without_a_question_is_named_or_recorded(record, reason, tmp_path):
    good = {"question_id": 1, "text": "?", "image": ""}
    path = tmp_path / "q.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(record)}\n")
    records = read_jsonl(str(path))
    with pytest.raises(ValueError, match=rf"question .* \(.*q.jsonl, line 3\).*{reason}"):
        questions_of(records, jsonl_questions)
    first, bad = questions_of(records, jsonl_questions, skip_bad=True)
    assert first.error is None and reason in bad.error
    assert bad.head == {"question_id": 7 if record.get("question_id") == 7 else "line 3"}
    with AnswersFile(str(tmp_path / "a.jsonl"), [first.head, bad.head], {}) as answers:
        answers.put(0, first.answer_line("yes", "", ""))
        answers.put(1, bad.failed_line("none", "", ""))
        answers.finish()
    with AnswersFile(str(tmp_path / "a.jsonl"), [first.head, bad.head], {}) as answers:
        assert answers.missing == [1]  # the file with a question without an id is read again


VISCOT = {"question_id": 7, "image": ["cot/gqa/1.jpg"], "conversations": [{"value": "?"}]}
OTHERS = {
    "sqa": {"id": "7", "conversations": []},
    "qbench": {"img_path": "7.png", "question": "?", "candidates": 3},
    "viscot_gqa": VISCOT | {"image": 5},
    "viscot_cub": VISCOT | {"conversations": [{"value": None}]},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_broken_record_of_any_format_is_named_with_its_place(name, tmp_path):
    record, place, benchmark = OTHERS[name], "item 1", find_benchmark(name)
    path = tmp_path / "q.json"
    path.write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=rf"question 7.* \(.*q.json, {place}\): no question can"):
        benchmark.select(benchmark.read(str(path)))
    (bad,) = benchmark.select(benchmark.read(str(path)), skip_bad=True)
    assert bad.error
    located = eval_viscot.read(str(path), str(tmp_path)) if "viscot" in name else []
    assert all(record.where == f"{path}, {place}" for record in located)


def test_a_row_without_a_picture_is_named_with_its_line(tmp_path):
    path = tmp_path / "q.tsv"
    path.write_text("index\tquestion\tA\tB\timage\n7\t?\tx\ty\t\n")
    mmbench = find_benchmark("mmbench")
    with pytest.raises(ValueError, match=r"question 7 \(.*q.tsv, line 2\).*its image is null"):
        mmbench.select(mmbench.read(str(path)))


def test_a_record_that_was_no_question_does_not_hinder_the_score(tmp_path, monkeypatch, capsys):
    whole = {"img_path": "1.png", "question": "?", "candidates": ["x", "y"], "correct_ans": "y"}
    path = tmp_path / "q.json"
    path.write_text(json.dumps([whole, {"img_path": "2.png", "question": "?"}]))
    qbench = find_benchmark("qbench")
    asked = qbench.read(str(path))
    good, bad = qbench.select(asked, skip_bad=True)
    lines = [good.answer_line("B", "", ""), bad.failed_line("none", "", "")]
    write_lines(tmp_path / "a.jsonl", lines)
    assert qbench.score(str(tmp_path), asked, lines).percent == 100
    files = ("--question-file", path, "--result-file", tmp_path / "a.jsonl")
    run_scorer(monkeypatch, eval_qbench, *files)
    out, err = capsys.readouterr()
    assert "Accuracy: 100.00%" in out and "1 of 2 questions failed" in err


# --- what becomes of the record -----------------------------------------------------------------


def answered(tmp_path, bad, count=6):
    questions = [Question({"question_id": n, "prompt": "?"}, "?") for n in range(count)]
    task = Task(questions, "", str(tmp_path / "a.jsonl"), "m", {})
    return answer_questions(task, lambda: Failing(bad), 4)


def test_a_failed_record_is_never_taken_for_an_answer(tmp_path, capsys):
    assert answered(tmp_path, bad=(1, 4)).num_failed == 2
    path = str(tmp_path / "a.jsonl")
    assert [answer["question_id"] for answer in read_answers(path)] == [0, 2, 3, 5]
    assert "2 of 6 questions failed" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: no field 'text'"):
        read_jsonl(path, ("question_id", "text"))
    answered(tmp_path, bad=range(6), count=6)  # the answers of before stay
    assert len(read_answers(path)) == 4
    (tmp_path / "a.jsonl").unlink()
    answered(tmp_path, bad=range(6))
    with pytest.raises(ValueError, match="all 6 questions failed, the first: n 0"):
        read_answers(path)


def test_failures_of_other_processes_are_taken_in_and_asked_again(tmp_path):
    path, heads = str(tmp_path / "a.jsonl"), [{"question_id": n} for n in range(4)]
    failed = {"question_id": 1, "error": "bad picture"}
    lines = [{"question_id": n, "text": str(n)} for n in range(4)]
    with AnswersFile(path, heads, {}) as file:
        other = Journal(path, 1)
        other.put(1, failed)
        other.put(2, lines[2])
        other.close()
        file.put(3, lines[3])
        file.put(0, lines[0])
        file.finish()
        assert file.num_failed == 1
    assert read_jsonl(path) == [lines[0], failed, lines[2], lines[3]]
    for _ in range(2):  # also when it is stopped at once, and started again
        with AnswersFile(path, heads, {}) as file:
            assert file.missing == [1]
    with AnswersFile(path, heads, {}) as file:
        file.put(1, lines[1])
        file.finish()
        assert not file.num_failed
    assert read_jsonl(path) == lines


def test_a_failure_of_an_earlier_run_never_stands_for_the_answer_of_this_one(tmp_path):
    """Its journal is there at once, that of another machine only after a while."""
    path, heads = str(tmp_path / "a.jsonl"), [{"question_id": 0}, {"question_id": 1}]
    with AnswersFile(path, heads, {}) as file:
        file.put(0, {"question_id": 0, "text": "yes"})
        earlier = Journal(path, 2)
        earlier.put(1, {"question_id": 1, "error": "bad picture"})
        earlier.close()
    with AnswersFile(path, heads, {}) as file:
        with pytest.raises(ValueError, match="has 1 of 2 answers: start the same command again"):
            file.finish()


@pytest.fixture
def args(tmp_path):
    return mini_benchmark.suite_args(tmp_path, methods=["random"], tokens=[64], pruning_arg=[])


def test_the_suite_says_how_many_failed_and_compares_what_both_answered(args):
    runs = [
        suite.Run("none", Budget(576), build_pruner()),
        suite.Run("random", Budget(64), build_pruner("random", visual_token_num=64)),
    ]
    benchmarks = suite.available(["pope", "gqa"], args.data_dir)
    scores = suite.run_all(Failing(unpruned=(), pruned=(1,)), runs, benchmarks, args)
    pope, pruned = scores[0], scores[2]
    # The labels are yes and no: "yes" to both is F1 66.7, and 100 without the second question.
    assert pope.percent == pytest.approx(200 / 3) and pruned.percent == 100
    assert (pope.failed, pruned.failed, pruned.count) == (0, 1, 1)
    assert pruned.change == 0 and pruned.same_as_dense == 100
    text = suite_report.table(scores)
    assert "| pope | F1 | 66.7 | 100.0 (1 failed) |" in text
    assert "| questions that failed |  | 0 | 2 |" in text
    written = json.loads(Path(args.out, "scores.json").read_text())["scores"]
    assert [one["failed"] for one in written] == [0, 0, 1, 1]

    costs = {(run.method, run.budget): Cost(64, 64, 1e4, 1e9, 0.01) for run in runs}
    comparison = compare_runs(runs, scores, costs, benchmarks, args)
    assert comparison.rows[1].cells[AVERAGE].failed == 2
    text = compare_report.markdown(comparison)
    assert "| `random` | 64 | pope | 1 | 1 |" in text and "100.0 (1 failed)" in text
    assert ",failed," in compare_report.csv_text(comparison)


def test_costs_are_measured_on_questions_that_can_be_asked(args):
    class Loop:
        skip_bad = True

        def inputs(self, question, folder):
            raise ValueError(f"{question}: bad picture")

    benchmarks = suite.available(["pope"], args.data_dir)
    with pytest.raises(ValueError, match="no question with an image to measure costs on"):
        sample_prompts(Loop(), benchmarks, args.data_dir, 2)
    Loop.skip_bad = False
    with pytest.raises(ValueError, match=r"question 1 \(.*line 1\): bad picture"):
        sample_prompts(Loop(), benchmarks, args.data_dir, 2)


def test_costs_are_measured_on_questions_that_were_asked(args):
    asked = []

    class Loop:
        def inputs(self, question, folder):
            asked.append(question.head["question_id"])
            return {"input_ids": None, "images": None, "image_sizes": None}

    benchmarks = suite.available(["gqa"], str(ROOT / "playground/benchmark"))
    sample_prompts(Loop(), benchmarks, str(ROOT / "playground/benchmark"), 4, limit=4)
    ((benchmark, records),) = benchmarks.items()
    assert asked == [question.head["question_id"] for question in benchmark.select(records, 4)]


@pytest.mark.parametrize("main", [True, False])
def test_a_run_that_answers_nothing_ends_for_all_processes_alike(args, main, monkeypatch, capsys):
    runs = [
        Run(name, Budget(tokens=64), build_pruner(name)) for name in ("none", "random", "fastervlm")
    ]
    benchmarks = {find_benchmark(name): Records("f", [{}]) for name in ("pope", "gqa")}
    asked = []

    def run_task(loop, run, benchmark, *rest):
        asked.append((run.method, benchmark.name))
        if main and asked[-1] == ("random", "pope"):  # the others do not read the answers
            raise NothingAnswered(2, "no room")
        return types.SimpleNamespace(task=benchmark.name, percent=0.0, failed=0)

    monkeypatch.setattr(suite, "run_task", run_task)
    monkeypatch.setattr(suite, "extent", lambda *_: "")
    monkeypatch.setattr(suite, "write_scores", lambda *_: None)
    loop = types.SimpleNamespace(model=types.SimpleNamespace(pruner=None))
    scores = suite.run_all(loop, runs, benchmarks, args, types.SimpleNamespace(main=main))
    assert asked == [(run.method, name) for run in runs for name in ("pope", "gqa")]
    if main:
        assert (
            len(scores) == 4
            and runs[1].refused == "pope: all 2 questions failed, the first: no room"
        )
        assert "random 64: stopped: pope: all 2 questions failed" in capsys.readouterr().out


def test_nothing_to_compare_is_said(args):
    runs = [
        suite.Run("none", Budget(576), build_pruner()),
        suite.Run("random", Budget(64), build_pruner("random")),
    ]
    benchmarks = suite.available(["pope"], args.data_dir)
    with pytest.raises(ValueError, match="pope: no question was answered by this run and by"):
        suite.run_all(Failing(unpruned=(0,), pruned=(1,)), runs, benchmarks, args)


def test_questions_scored_jointly_with_a_failed_one_are_left_out(args):
    benchmark = find_benchmark("mme")
    path = os.path.join(args.data_dir, benchmark.questions)
    first, second = benchmark.select(benchmark.read(path))
    records = [first.answer_line("Yes", "x", "m"), second.failed_line("no", "y", "m")]
    with pytest.raises(ValueError, match="mme: no question is left to score"):
        benchmark.score(args.data_dir, benchmark.read(path), records, None)


def test_score_and_table_say_how_many_failed(args, tmp_path, capsys, monkeypatch):
    benchmark = find_benchmark("pope")
    path = os.path.join(args.data_dir, benchmark.questions)
    first, second = benchmark.select(benchmark.read(path))
    lines = [first.answer_line("Yes", "x", "m"), second.failed_line("bad picture", "y", "m")]
    answers = tmp_path / "a.jsonl"
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["score", "pope", "--data-dir", args.data_dir, "--answers-file", str(answers)]
    monkeypatch.setattr(sys, "argv", argv)
    score.main()
    printed = capsys.readouterr().out
    assert "Failed: 1 of 2 questions failed and have no answer; the first: bad picture" in printed
    summary = json.loads(printed.splitlines()[-1])
    assert (summary["score"], summary["count"], summary["failed"]) == (100, 1, 1)
    result = json.loads((tmp_path / "a.score.json").read_text())
    assert result["failed_questions"] == [[2, "bad picture"]]
    assert result["images"] == 1 and result["interval"] is None
    assert "| 100.00 | 1 (1 failed) |" in score_table.table([result])


def test_a_judge_is_not_asked_about_failed_questions(tmp_path, capsys):
    head = {"question_id": 1, "prompt": "What?"}
    lines = [head | {"text": "Red.", "answer": "red"}, head | {"error": "bad picture"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    units = eval_viscot.units(read_answers(str(path)), None)
    assert (units.percent, units.count) == (100, 1)
    assert "1 of 2 questions failed" in capsys.readouterr().err


def test_a_server_gets_no_file_while_questions_failed(args, tmp_path, capsys, monkeypatch):
    benchmark = find_benchmark("mmbench")
    path = os.path.join(args.data_dir, benchmark.questions)
    first, second = benchmark.select(benchmark.read(path))
    lines = [first.answer_line("A", "x", "m"), second.failed_line("bad picture", "y", "m")]
    answers = tmp_path / "a.jsonl"
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["score", "mmbench", "--data-dir", args.data_dir, "--answers-file", str(answers)]
    monkeypatch.setattr(sys, "argv", argv)
    score.main()
    assert "no file for the server, which wants an answer to every" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.xlsx"))
