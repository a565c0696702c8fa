"""MME: the two questions about an image are scored together, whatever the order [B4]."""

import pytest

from llava.eval.benchmarks import mme as eval_mme
from tests.eval.eval_files import SHORT, run_scorer, write_lines


@pytest.fixture
def mme(tmp_path):
    """Two images with two questions each, and right answers."""
    answers = []
    for name in ("0001", "0002"):
        path = tmp_path / f"MME_Benchmark_release_version/existence/{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for number, truth in enumerate(("Yes", "No")):
            question = f"Is thing {number} in {name}?"
            lines.append(f"{question} Please answer yes or no.\t{truth}\r\n")
            key = {"question_id": f"existence/{name}.png", "prompt": question + SHORT}
            answers.append(key | {"text": truth})
        path.write_text("".join(lines))
    return tmp_path, answers


def mme_score(folder, answers):
    lines = eval_mme.convert(eval_mme.read_ground_truth(folder), answers)
    return eval_mme.units(lines).result()["score"]


def test_b4_mme_scores_do_not_depend_on_order_repetition_and_white_space(mme, monkeypatch, capsys):
    folder, answers = mme
    assert mme_score(folder, answers) == 200
    shuffled = [answers[n] for n in (3, 0, 2, 1)]
    spaced = [a | {"text": text} for a, text in zip(answers, TEXTS, strict=True)]
    for variant in (answers[::-1], shuffled, answers * 2, spaced):
        assert mme_score(folder, variant) == 200
        write_lines(folder / "a.jsonl", variant)
        out = folder / "out"
        files = ("--data-dir", folder, "--result-file", folder / "a.jsonl")
        run_scorer(monkeypatch, eval_mme, *files, "--output-dir", out)
        assert len((out / "existence.txt").read_text().splitlines()) == 4
        run_scorer(monkeypatch, eval_mme, "--results-dir", out)
        assert capsys.readouterr().out.count("existence  score: 200.0") == 2


def test_mme_names_of_images_may_have_dots(mme):
    folder, answers = mme
    place = folder / "MME_Benchmark_release_version/existence"
    (place / "0002.txt").rename(place / "b.0002.v1.txt")
    renamed = [a | {"question_id": a["question_id"].replace("0002", "b.0002.v1")} for a in answers]
    assert mme_score(folder, renamed) == 200


TEXTS = ("Yes\tit is", "No\n\nthere is none", " yes\r\n", "\tNo\u2028not here")


def test_b4_mme_names_a_missing_answer_and_two_that_contradict_each_other(mme, monkeypatch):
    folder, answers = mme
    files = ("--data-dir", folder, "--result-file", write_lines(folder / "a.jsonl", answers[:-1]))
    with pytest.raises(
        SystemExit, match="a.jsonl: no answer to 'Is thing 1 in 0002.*existence/0002"
    ):
        run_scorer(monkeypatch, eval_mme, *files)
    write_lines(folder / "a.jsonl", [*answers, answers[0] | {"text": "No"}])
    with pytest.raises(SystemExit, match="a.jsonl: question 'existence/0001.png' has two answers"):
        run_scorer(monkeypatch, eval_mme, *files)
    write_lines(folder / "a.jsonl", [*answers, answers[0] | {"question_id": "existence/9.png"}])
    with pytest.raises(SystemExit, match="a.jsonl: no ground truth for existence/9.png"):
        run_scorer(monkeypatch, eval_mme, *files)


def test_mme_says_how_many_images_have_no_answer(mme, monkeypatch, capsys):
    folder, answers = mme
    path = write_lines(folder / "a.jsonl", answers[:2])
    run_scorer(monkeypatch, eval_mme, "--data-dir", folder, "--result-file", path)
    said = capsys.readouterr().err
    assert "1 of 2 images have no answer, such as existence/0002" in said
    assert "the totals are without count, position" in said and "existence," not in said


@pytest.mark.parametrize(
    "lines, message",
    [
        (["a.txt\tp\tYes\tyes"], "existence: a.txt has 1 of its 2 answers"),
        (["a.txt\tp\tYes\tyes", "a.txt\tp\tYes\tno"], "'p' about a.txt has two answers"),
        (["yes"], "existence.txt, line 1: no file, question, Yes or No, and answer"),
    ],
)
def test_official_result_files_of_mme_are_paired_by_image(lines, message, tmp_path):
    path = tmp_path / "existence.txt"
    right = ["a.txt\tp\tYes\tyes\nindeed", "b.txt\tp\tNo\tno", "a.txt\tq\tNo\tno\tway"]
    path.write_text("\n".join([*right, "b.txt\tq\tYes\tYes", ""]))
    assert eval_mme.units(eval_mme.read_results(tmp_path)).result()["score"] == 200
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        eval_mme.units(eval_mme.read_results(tmp_path))


def test_mme_names_a_task_it_does_not_have_and_the_group_that_is_scored():
    pair = ["a.txt\tp\tYes\tyes", "a.txt\tq\tNo\tno"]
    with pytest.raises(ValueError, match="MME has no task 'existance'"):
        eval_mme.units({"existance": pair})
    assert eval_mme.units({"code_reasoning": pair}).details["metric"] == "cognition"
    assert eval_mme.units({"OCR": pair, "code_reasoning": pair}).details["metric"] == "perception"
