"""Judged benchmarks: what the judge is asked, how its words become scores, and goings-on."""

import json
import sys

import pytest

from llava import answer_scores
from llava.eval import score
from llava.eval.benchmarks import find_benchmark
from llava.eval.benchmarks import mmvet as eval_mmvet
from llava.eval.benchmarks import viscot as eval_viscot
from llava.eval.files.answer_lines import read_answers
from llava.eval.scoring.judge import Judge
from tests.eval.stub_judge import stub_judge


def write_answers(path, count):
    records = [
        {"question_id": n, "prompt": f"Q{n}?", "text": f"own {n}", "answer": f"right {n}"}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def number_of(body):
    """The n of "own n" in a request."""
    return int(body["messages"][-1]["content"].split("own ")[1].split()[0])


@pytest.mark.parametrize(
    "reply, score",
    [
        ("score: 0.7", 0.7),
        ("Score: 1", 1.0),
        ("The answer is close.\nscore: 0.25", 0.25),
        ("score: 7", 1.0),
        ("score: 0.2 or score: 0.3", 0.0),
        ("0.7", 0.0),
        ("score: 0.5.", 0.5),
        ("score: 0.5.1", 0.0),
        ("score: -1", 0.0),
    ],
)
def test_a_verdict_is_a_number_after_the_word_score_once(reply, score):
    assert answer_scores.judged_score(reply) == score


def test_the_judge_reads_the_question_without_the_request_to_be_brief():
    record = {"prompt": f"What is it?{eval_viscot.BRIEF}", "text": "a cat", "answer": "a dog"}
    system, user = eval_viscot.judge_prompt(record)
    assert user == "\nquestion: What is it?\nstandard answer: a dog\nmodel's answer: a cat\n"
    assert system.startswith("\nYou are responsible for proofreading the answers, you need to give")
    assert system.endswith("the standard answer, the higher the score.\n")


def test_scoring_that_broke_off_goes_on_and_the_file_is_named_after_the_mean(tmp_path, monkeypatch):
    answers = tmp_path / "a.jsonl"
    write_answers(answers, 10)
    fail = {"from": 6}

    def reply(number, body):
        if number_of(body) >= fail["from"]:
            return 400, "out of credit"
        return f"score: {number_of(body) / 10}"

    with stub_judge(reply) as server:
        argv = ["--result-file", str(answers), "--judge-url", server.url, "--judge-workers", "1"]
        monkeypatch.setattr(sys, "argv", ["eval_viscot", *argv])
        with pytest.raises(SystemExit, match="refuses with status 400: out of credit"):
            eval_viscot.main()
        assert not list(tmp_path.glob("a_judge*"))
        fail["from"], before = 99, len(server.requests)
        eval_viscot.main()
        assert len(server.requests) - before == 4
    scored = [json.loads(x) for x in (tmp_path / "a_judge-0.4500.jsonl").read_text().splitlines()]
    assert [record["score"] for record in scored] == [n / 10 for n in range(10)]
    assert len(list(tmp_path.glob("a_judge*"))) == 1


def test_a_second_scoring_asks_nothing_and_replaces_the_first(tmp_path, monkeypatch):
    answers = tmp_path / "a.jsonl"
    write_answers(answers, 3)
    with stub_judge(["score: 0.4"]) as server:
        argv = ["--result-file", str(answers), "--judge-url", server.url]
        monkeypatch.setattr(sys, "argv", ["eval_viscot", *argv])
        eval_viscot.main()
        eval_viscot.main()
        assert len(server.requests) == 3
    assert [path.name for path in tmp_path.glob("a_judge*")] == ["a_judge-0.4000.jsonl"]


def test_precise_match_needs_no_judge(tmp_path):
    path = tmp_path / "a.jsonl"
    pairs = [("A cat.", "a cat"), ("cat", "a cat")]
    records = [
        {"question_id": n, "prompt": "?", "text": text, "answer": answer}
        for n, (text, answer) in enumerate(pairs)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    units = eval_viscot.units(read_answers(str(path)), None)
    assert units.percent == 50 and units.details["file"].endswith("a_precise_match-0.5000.jsonl")


@pytest.fixture
def record():
    return {
        "dataset": "gqa",
        "split": "val",
        "question_id": 4,
        "image": ["cot/gqa/1.jpg", "cot/gqa/1.jpg###[1, 2, 30, 40]"],
        "conversations": [
            {"from": "human", "value": f"<image>\nWho is it? {eval_viscot.ASKS_FOR_BOX}"},
            {"from": "gpt", "value": "[0.1, 0.2, 0.3, 0.4]"},
            {"from": "human", "value": "<image>"},
            {"from": "gpt", "value": "A man."},
        ],
    }


def test_a_visual_cot_record_becomes_its_question_answer_image_and_box(record):
    (question,) = eval_viscot.viscot_questions(record)
    assert question.text == "Who is it?" and question.images == ["cot/gqa/1.jpg"]
    line = question.answer_line("A woman.", "id", "m")
    assert line["answer"] == "A man." and line["text"] == "A woman."


def test_a_picture_below_the_folder_val_is_found(record, tmp_path):
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps([record]))
    (tmp_path / "cot/gqa/val").mkdir(parents=True)
    (tmp_path / "cot/gqa/val/1.jpg").touch()
    located = lambda: eval_viscot.read(str(path), str(tmp_path))[0]  # noqa: E731
    assert eval_viscot.image_of(located()) == "cot/gqa/val/1.jpg"
    (tmp_path / "cot/gqa/1.jpg").touch()
    assert eval_viscot.image_of(located()) == "cot/gqa/1.jpg"


@pytest.mark.parametrize(
    "reply, grade",
    [
        ("0.8", 0.8),
        ("1", 1.0),
        ("1.0\n", 1.0),
        (".5", 0.5),
        ("Correctness: 0.3.", 0.3),
        ("10", None),
        ("2.5", None),
        ("none", None),
    ],
)
def test_a_grade_is_the_first_number_from_0_to_1(reply, grade):
    assert eval_mmvet.parse_grade(reply) == grade


def test_grades_are_averaged_per_capability_and_unreadable_ones_left_out(tmp_path):
    entries = {
        f"v1_{n}": {"question": "Q?", "answer": "a<AND>b", "capability": names}
        for n, names in enumerate((["rec"], ["rec", "ocr"], ["ocr"]))
    }
    answers = [{"question_id": n, "text": f"own {n}"} for n in range(3)]
    with stub_judge(["0.2", "0.6", "cannot say"]) as server:
        judge = Judge("m", server.url, workers=1)
        units = eval_mmvet.units(judge, entries, answers, str(tmp_path / "g.jsonl"))
    assert units.percent == pytest.approx(40)
    assert units.details == {"count": 3, "unreadable": 1}
    parts = {name: part.percent for name, part in units.by_group().items()}
    assert parts == pytest.approx({"rec": 40, "ocr": 60})
    assert "Ground truth: a <AND> b\n" in server.requests[0]["messages"][1]["content"]


def test_the_benchmarks_own_prompt_is_followed_by_a_row_of_its_table():
    entry = {"question": "Q?", "answer": "a<OR>b"}
    system, user = eval_mmvet.judge_prompt(entry, "two\nlines", "Header | of the table\n")
    assert system == "" and user == "Header | of the table\nQ? | a <OR> b | two lines | "


@pytest.fixture
def judged_data(tmp_path):
    """Three questions about two images, in the format of every judged benchmark."""
    rows = [(1, "a.jpg"), (2, "a.jpg"), (3, "b.jpg")]
    asked = [
        {"question_id": n, "image": image, "text": f"Q{n}?", "category": "conv"}
        for n, image in rows
    ]
    texts = [{"question_id": n, "text": f"ref {n}"} for n, _ in rows]
    captions = [{"image": image, "caption": "A dog."} for image in ("a.jpg", "b.jpg")]
    entries = {
        f"v1_{n}": {"question": f"Q{n}?", "answer": "x", "capability": ["rec"]} for n, _ in rows
    }
    cot = [
        {
            "question_id": n,
            "image": [image, f"{image}###[{n}, 2, 30, 40]"],
            "conversations": [{"value": f"<image>\nQ{n}?"}, {"value": f"right {n}"}],
        }
        for n, image in rows
    ]
    files = {
        "llava-bench-in-the-wild/questions.jsonl": asked,
        "llava-bench-in-the-wild/answers_gpt4.jsonl": texts,
        "llava-bench-in-the-wild/context.jsonl": captions,
        "mm-vet/llava-mm-vet.jsonl": asked,
        "mm-vet/mm-vet.json": entries,
        "viscot/benchmark/gqa.json": cot,
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = [content] if path.suffix == ".json" else content
        path.write_text("".join(json.dumps(line) + "\n" for line in whole))
    return tmp_path


def judged_score(name, folder, server, monkeypatch):
    """Scores the answers "own 1", "own 2", "own 3"; returns what lies in the `.score.json`."""
    benchmark = find_benchmark(name)
    questions = benchmark.select(benchmark.read(str(folder / benchmark.questions)))
    lines = [q.answer_line(f"own {n}", "id", "m") for n, q in enumerate(questions, start=1)]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["score", name, "--data-dir", folder, "--answers-file", folder / "a.jsonl"]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--judge-url", server.url])
    score.main()
    return json.loads((folder / "a.score.json").read_text())


def in_tenths(number, body):
    """Twice the n of "own n": out of ten for a pair, in tenths for the others."""
    points = 2 * number_of(body)
    text = json.dumps(body["messages"])
    if "proofreading" in text:
        return f"score: 0.{points}"
    return f"8 {points}\nbecause" if "[Assistant 1]" in text else f"0.{points}"


@pytest.mark.parametrize("name", ["llavabench", "mmvet", "viscot_gqa"])
def test_a_judged_score_has_an_interval_over_its_images(name, judged_data, monkeypatch):
    with stub_judge(in_tenths) as server:
        result = judged_score(name, judged_data, server, monkeypatch)
    assert result["score"] == result["percent"] == pytest.approx(50 if name == "llavabench" else 40)
    # Two images: either is drawn twice, or both.
    ends = pytest.approx([37.5, 75] if name == "llavabench" else [30, 60])
    assert result["images"] == 2 and result["interval"] == ends
    assert result["count"] == 3 and result["unreadable"] == 0


@pytest.mark.parametrize("name", ["llavabench", "mmvet"])
def test_a_judge_that_gives_no_scores_at_all_is_no_score_of_0(name, judged_data, monkeypatch):
    with stub_judge(["I would rather not."]) as server:
        with pytest.raises(SystemExit, match="error: .*no reply of the judge holds"):
            judged_score(name, judged_data, server, monkeypatch)


def test_pairs_without_scores_are_left_out_and_counted(judged_data, monkeypatch):
    def reply(number, body):
        return "both good" if number_of(body) == 3 else in_tenths(number, body)

    with stub_judge(reply) as server:
        result = judged_score("llavabench", judged_data, server, monkeypatch)
    assert (result["score"], result["count"], result["unreadable"]) == (37.5, 3, 1)
    assert result["images"] == 1 and result["interval"] is None
    assert result["means"] == {"all": [8, 3], "llava_bench_conv": [8, 3]}
