"""Programs that LLaVA's users know by name, run as they type them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

PROGRAMS = """
run_llava model_vqa model_vqa_loader model_vqa_science model_vqa_mmbench model_vqa_qbench
model_qa eval_pope eval_textvqa eval_science_qa eval_science_qa_gpt4
eval_science_qa_gpt4_requery eval_gpt_review eval_gpt_review_bench eval_gpt_review_visual
summarize_gpt_review generate_webpage_data_from_table
""".split()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_llava_is_there_and_on_the_page(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"llava.eval.{name}", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"llava.eval.{name}", run_name="__main__")
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("usage:")
    assert f"`{name}`" in (ROOT / "docs/Evaluation.md").read_text(encoding="utf-8")


def write(path: Path, content) -> str:
    """Writes JSON, or JSON lines where the name ends so; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = content if path.suffix == ".jsonl" else [content]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def run(name: str, *argv, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", f"llava.eval.{name}", *map(str, argv)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        encoding="utf-8",
    )


@pytest.fixture
def science(tmp_path):
    """Four questions with the answers B, A, B, A; LLaVA has 1 and 2 right, GPT-4 1 and 3."""
    truth = {"1": 1, "2": 0, "3": 1, "4": 0}
    problems = {key: {"choices": ["x", "y"], "answer": answer} for key, answer in truth.items()}
    write(tmp_path / "problems.json", problems)
    write(tmp_path / "pid_splits.json", {"test": list(truth)})
    ours = {1: "Because. The answer is B.", 2: "A", 3: "The answer is A.", 4: "The answer is B."}
    answers = [{"question_id": str(key), "text": text} for key, text in ours.items()]
    write(tmp_path / "ours.jsonl", answers)
    gpt4 = {"1": "The answer is B.", "2": "I cannot tell.", "3": "The answer is B.", "4": "E"}
    write(tmp_path / "gpt4.json", {"outputs": gpt4})
    again = [{"question_id": "3", "text": "The answer is A."}, {"question_id": "4", "text": "A"}]
    write(tmp_path / "again.jsonl", again)
    return tmp_path


FILES = "--base-dir . --gpt4-result gpt4.json --our-result ours.jsonl".split()


def test_llava_answers_where_gpt4_gives_no_answer(science):
    done = run("eval_science_qa_gpt4", *FILES, folder=science)
    assert done.stdout.splitlines() == [
        "Total: 4, without an answer of GPT-4: 2",
        "LLaVA: Correct: 2, Accuracy: 50.00%",
        "GPT-4: Correct: 2, Accuracy: 50.00%",
        "GPT-4, else LLaVA: Correct: 3, Accuracy: 75.00%",
        "Either: Correct: 3, Accuracy: 75.00%",
    ]


def test_gpt4_that_saw_both_answers_decides_where_they_differ(science):
    more = ["--requery-result", "again.jsonl", "--output-result", "out.json"]
    done = run("eval_science_qa_gpt4_requery", *FILES, *more, folder=science)
    assert "GPT-4, asked again: Correct: 3, Accuracy: 75.00%" in done.stdout.splitlines()
    chosen = json.loads((science / "out.json").read_text())
    # 2 was not asked again, 3 was decided for LLaVA, and 4 for what neither had said
    assert chosen["results"] == {"1": 1, "2": 0, "3": 0, "4": 0}
    assert chosen["outputs"]["4"] == "A" and chosen["acc"] == 75 and chosen["count"] == 4


def test_answers_of_gpt4_that_are_missing_are_named_and_those_of_another_form_refused(science):
    write(science / "gpt4.json", {"outputs": {"1": "The answer is B."}})
    done = run("eval_science_qa_gpt4", *FILES, folder=science)
    assert "gpt4.json: 3 of 4 questions have no answer, such as 2" in done.stderr
    assert "GPT-4, else LLaVA: Correct: 2, Accuracy: 50.00%" in done.stdout
    write(science / "gpt4.json", {"1": "The answer is B."})
    done = run("eval_science_qa_gpt4", *FILES, folder=science)
    assert done.returncode == 1
    assert done.stderr.startswith("error: gpt4.json: no 'outputs'")


@pytest.fixture
def table(tmp_path):
    folder = tmp_path / "table"
    questions = [{"question_id": n, "text": f"Q{n}?", "category": "conv"} for n in (1, 2)]
    write(folder / "question.jsonl", questions)
    write(folder / "model.jsonl", [{"model_id": "b:7b", "model_name": "b"}])
    for model in ("a", "a_b"):
        answers = [{"question_id": n, "text": f"{model}{n}"} for n in (2, 1)]
        write(folder / f"answer/answer_{model}.jsonl", answers)
    ours = [{"question_id": n, "content": f"8 {n}\nwhy", "tuple": [8, n]} for n in (1, 2)]
    write(folder / "review/review_a_b_gpt-4.jsonl", ours)
    return tmp_path


def test_the_page_gets_questions_answers_and_reviews(table):
    done = run("generate_webpage_data_from_table", folder=table)
    assert done.returncode == 0, done.stderr
    data = json.loads((table / "webpage/data.json").read_text())
    assert data["models"] == {"b:7b": {"model_id": "b:7b", "model_name": "b"}}
    assert data["questions"][1] == {
        "id": 2,
        "category": "conv",
        "question": "Q2?",
        "answers": {"a": "a2", "a_b": "a_b2"},
        "evaluations": {"a_b": "8 2\nwhy"},
        "scores": {"a_b": [8, 2]},
    }


def test_the_page_is_not_made_of_incomplete_tables(table):
    write(table / "table/answer/answer_a.jsonl", [{"question_id": 1, "text": "x"}])
    done = run("generate_webpage_data_from_table", folder=table)
    assert done.returncode == 1 and "answer_a.jsonl: nothing on question 2" in done.stderr
    done = run("generate_webpage_data_from_table", "--table", "nowhere", folder=table)
    assert done.returncode == 1 and "nowhere" in done.stderr


def test_text_questions_are_answered_without_their_images(tmp_path):
    questions = [{"question_id": n, "text": "Say red.", "image": "nowhere.png"} for n in (1, 2)]
    write(tmp_path / "q.jsonl", questions)
    model = ROOT / "playground/checkpoints/llava-v1.5-playground"
    files = ["--question-file", "q.jsonl", "--answers-file", "a.jsonl"]
    cap = ["--max_new_tokens", "2", "--device", "cpu"]
    done = run("model_qa", "--model-name", model, *files, *cap, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [1, 2]
    assert all(line["model_id"] == "llava-v1.5-playground" for line in lines)
    settings = json.loads((tmp_path / "a.settings.json").read_text())
    assert settings["temperature"] == 0.7


def test_a_folder_of_reviews_is_summarized_without_the_cache_of_the_judge(tmp_path):
    review = {"question_id": 1, "category": "conv", "tuple": [8, 6]}
    write(tmp_path / "reviews/a.jsonl", [review])
    write(tmp_path / "reviews/judge_cache.jsonl", [{"key": "k", "model": "m", "reply": "8 6"}])
    done = run("summarize_gpt_review", "-d", "reviews", folder=tmp_path)
    assert done.stdout.splitlines()[:2] == ["a", "all 75.0 80.0 60.0"] and not done.stderr
    for words in (["-d", "."], ["-d", "reviews", "-s", "b"]):
        done = run("summarize_gpt_review", *words, folder=tmp_path)
        assert done.returncode == 1 and done.stderr.startswith(
            f"error: {words[1]} holds no reviews"
        )
