"""Answers files of every benchmark side by side: questions, pictures, masks, scores, conditions."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.eval.answering.questions import Question, subset
from llava.eval.benchmarks import data_files, find_benchmark
from llava.eval.browse import pictures
from llava.eval.browse.conditions import read_condition
from llava.eval.browse.program import build_parser, read_runs
from llava.eval.browse.runs import Pair, Run, find_source
from llava.eval.files import box_counts
from llava.eval.files.mask_files import mask_path, write_mask

NUMBERS = {"gen": 0.5, "ref": 1.0, "iou": 0.2, "ratio": 0.05, "ref_iou": None}


@pytest.mark.parametrize(
    "text, holds",
    [
        ("", True),
        ("gen < ref", True),
        ("gen > ref", False),
        ("gen>ref or iou<0.3", True),
        ("not (gen < ref and ratio < .1)", False),
        ("0.1 < iou <= 0.2", True),
        ("iou > -1", True),
        ("ref_iou < 1 or ref_iou >= 1", False),  # not known
        ("ref_ratio < 1", False),
    ],
)
def test_conditions_compare_what_is_known_of_a_question(text, holds):
    assert read_condition(text)(NUMBERS) is holds


@pytest.mark.parametrize(
    "text", ["gen", "gen <", "__import__('os').system('x') < 1", "gen < 'a'", "size < 1", "1 if 2"]
)
def test_anything_else_is_no_condition(text):
    with pytest.raises(ValueError, match="compare gen, ref, iou, ratio"):
        read_condition(text)


def answers(folder: Path, name: str, method: str, texts: list[str], **more) -> Path:
    """An answers file as the scripts would have written it, on the playground's questions."""
    benchmark = find_benchmark(name)
    source, _ = data_files.find(benchmark)
    asked = subset(benchmark.read(f"{source}/{benchmark.questions}"), len(texts))
    questions = [q for record in asked for q in benchmark.to_questions(record)]
    split = Path(benchmark.questions).stem
    top = benchmark.questions.split("/")[0]
    path = folder / top / "answers" / split / "model" / method / f"n_64{benchmark.label}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        question.answer_line(texts[n % len(texts)], f"id{n}", "model", more.get("metadata"))
        for n, question in enumerate(questions)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


PRESENT = data_files.present()


@pytest.mark.parametrize("name", PRESENT)
def test_answers_of_every_benchmark_find_their_questions_and_pictures(name, tmp_path):
    path = answers(tmp_path, name, "random", ["A", "B"])
    source = find_source(str(path))
    assert source.benchmark.questions == find_benchmark(name).questions
    run = Run.read(str(path), source)
    assert run.name == str(Path("model/random") / path.name) and len(run.lines) >= 2
    for place, line in run.lines.items():
        question = source.question(line)
        assert question is not None
        drawn = pictures.draw(question, run, place, boxes=True, mask=True)
        assert len(drawn) == len(question.images)
    assert list(Pair(run, run).places.items()) == [(n, n) for n in run.lines]


def test_there_is_something_of_every_kind():
    assert {"pope", "mme", "mmbench", "seed", "sqa", "refcoco", "viscot_gqa"} <= set(PRESENT)


def test_brief_answers_are_told_from_others_by_the_name_of_their_file(tmp_path):
    brief = find_source(str(answers(tmp_path, "viscot_gqa_brief", "random", ["a"])))
    assert brief.benchmark.name == "viscot_gqa_brief"
    other = find_source(str(answers(tmp_path, "viscot_gqa", "random", ["a"])))
    assert other.benchmark.name == "viscot_gqa"


def test_scores_come_from_a_judge_or_from_the_right_answers(tmp_path):
    path = answers(tmp_path, "gqa", "random", ["yes", "no", "red", "2"])
    run = Run.read(str(path), find_source(str(path)))
    assert len(run.scores) >= 4 and set(run.scores.values()) <= {0.0, 1.0}
    path = answers(tmp_path, "viscot_gqa", "random", ["a", "b"])
    assert Run.read(str(path), find_source(str(path))).score(0) is None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    scored = [json.dumps(line | {"score": 0.25 * n}) for n, line in enumerate(lines)]
    path.with_name(f"{path.stem}_judge-0.1250.jsonl").write_text("\n".join(scored) + "\n")
    run = Run.read(str(path), find_source(str(path)))
    assert [run.score(n) for n in run.lines] == [0.0, 0.25]
    shorter = path.with_name(f"{path.stem[:-1]}.jsonl")  # n_6 beside n_64_judge-...
    for name in (f"{path.stem[:-1]}_limit2_judge-0.1250.jsonl", f"{path.stem[:-1]}_x-0.1.jsonl"):
        path.with_name(name).write_text("\n".join(scored) + "\n")
    path.rename(shorter)
    assert Run.read(str(shorter), find_source(str(shorter))).scores == {}


def pair_of(folder: Path) -> tuple[Pair, list[Path]]:
    """Two files about four questions: the second lacks one, and knows nothing of boxes."""
    kept, wanted = np.eye(24, dtype=bool), np.tri(24, dtype=bool)
    metadata = {"boxes": box_counts.counts(kept, wanted), "visual_tokens": 24}
    metadata["visual_tokens_unpruned"] = 576
    ours = answers(folder, "viscot_gqa", "ours", ["a", "b", "c", "d"], metadata=metadata)
    theirs = answers(folder, "viscot_gqa", "theirs", ["a", "x", "c", "d"])
    theirs.write_text("".join(theirs.read_text().splitlines(True)[1:]))
    for n in range(4):
        write_mask(kept, mask_path(str(ours), n), [(0, 0, 336, 336)])
    runs = [Run.read(str(path), find_source(str(path))) for path in (ours, theirs)]
    return Pair(*runs), [ours, theirs]


@pytest.mark.parametrize("name", ["textvqa", "mme", "qbench", "mmbench", "gqa"])
def test_every_line_of_a_benchmark_that_is_scored_here_has_its_score(name, tmp_path):
    path = answers(tmp_path, name, "random", ["Yes", "Yes"] if name == "mme" else ["A", "A"])
    source = find_source(str(path))
    run = Run.read(str(path), source)
    if name == "mmbench":  # no circle is whole
        assert run.scores == {} or all(run.score(n) is not None for n in run.lines)
    else:
        assert run.lines and all(run.score(number) is not None for number in run.lines)


def test_a_score_of_an_answer_that_is_another_now_is_not_shown(tmp_path, capsys):
    path = answers(tmp_path, "viscot_gqa", "random", ["old", "same"])
    lines = [json.loads(line) | {"score": 1.0} for line in path.read_text().splitlines()]
    scored = path.with_name(f"{path.stem}_judge-1.0000.jsonl")
    scored.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = find_source(str(path))
    assert {Run.read(str(path), source).score(n) for n in range(len(lines))} == {1.0}
    answers(tmp_path, "viscot_gqa", "random", ["new", "same"])
    again = Run.read(str(path), source)
    assert [again.score(n) for n in range(2)] == [None, 1.0]
    assert "answers that are others in" in capsys.readouterr().err


def test_a_question_that_cannot_be_read_hides_no_other(tmp_path):
    path = answers(tmp_path, "gqa", "random", ["yes", "no"])
    source = find_source(str(path))
    broken = [type(source.asked[0])({"question_id": "x"}, "here"), *source.asked]
    source.asked = type(source.asked)(source.asked.path, broken)
    assert all(source.question(line) for line in Run.read(str(path), source).lines.values())


def test_lines_meet_by_their_question_and_conditions_choose_among_them(tmp_path):
    pair, _ = pair_of(tmp_path)
    ids = [line["question_id"] for line in pair.run.lines.values()]
    assert list(pair.places) == [1, 2, 3] and list(pair.places.values()) == [0, 1, 2]
    pair.run.scores = dict(zip(ids, (1.0, 0.0, 1.0, 1.0), strict=True))
    pair.other.scores = dict(zip(ids[1:], (1.0, 0.5, 1.0), strict=True))
    assert pair.chosen(read_condition("gen < ref")) == [1]
    assert pair.chosen(read_condition("gen > ref")) == [2]
    assert pair.chosen(read_condition("ratio < 0.05 and iou < 0.1")) == [1, 2, 3]
    assert pair.chosen(read_condition("ref_iou < 1")) == []
    assert pair.numbers(1)["ratio"] == pytest.approx(24 / 576)


def test_files_without_a_question_in_common_are_refused(tmp_path):
    pope = answers(tmp_path, "pope", "random", ["yes", "no"])
    viscot = answers(tmp_path, "viscot_gqa", "random", ["a", "b"])
    runs = [Run.read(str(path), find_source(str(path))) for path in (pope, viscot)]
    with pytest.raises(ValueError, match="have no question in common"):
        Pair(*runs)


def test_kept_tokens_are_green_where_their_crop_lies_and_boxes_are_red(tmp_path):
    picture = Image.new("RGB", (80, 40), "black")
    mask = np.array([[0, 0], [1, 0]], bool)
    drawn = np.asarray(pictures.colored(picture, mask, [(0, -20, 80, 80)]))
    assert (drawn[21:39, 1:39] == (0, 102, 0)).all() and not drawn[:, 41:].any()
    assert not drawn[:19].any()
    whole = np.asarray(pictures.colored(picture, mask, []))  # of a program that says no frames
    assert whole[30, 10, 1] == 102 and not whole[10].any()
    pair, _ = pair_of(tmp_path)
    question = pair.run.source.question(pair.run.lines[1])
    (plain,) = pictures.draw(question, pair.run, 1, boxes=False, mask=False)
    (both,) = pictures.draw(question, pair.run, 1, boxes=True, mask=True)
    left, top, *_ = question.boxes[0][0]
    assert both.getpixel((left, top)) == pictures.RED != plain.getpixel((left, top))
    assert both.getpixel((100, 100))[1] > plain.getpixel((100, 100))[1]  # on the diagonal


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../secret.png"])
def test_pictures_outside_of_the_image_folder_are_not_shown(name, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    question = Question({"question_id": 0}, "What?", [name])
    with pytest.raises(ValueError, match="lies outside of the image folder"):
        pictures.open_image(question, 0, str(folder))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="lies outside"):
        pictures.open_image(Question({"question_id": 0}, "", ["link.png"]), 0, str(folder))


def test_the_page_shows_steps_jumps_and_says_what_is_wrong(tmp_path):
    pytest.importorskip("gradio")
    from llava.eval.browse.page import NOTHING, Page

    _, paths = pair_of(tmp_path)
    runs = read_runs(build_parser().parse_args(list(map(str, paths))))
    page, (left, right) = Page(runs), list(runs)
    number, count, question, answer, numbers, shown, *others = page.show(
        left, right, "", True, True, 5
    )
    assert (number, count) == (2, "2 of 3")  # beyond the end it begins again
    assert question.startswith("Question 10:") and "Right answer" in question
    assert (answer, others[0]) == ("c", "c") and "kept 0.042" in numbers
    assert len(shown) == len(others[2]) == 1
    assert page.show(left, right, "gen < ref", True, True, 1)[1] == "none of 3 questions"
    assert "is no condition" in page.show(left, right, "gen <", True, True, 1)[1]
    alone = page.show(left, NOTHING, "", False, False, 0)
    assert alone[1] == "1 of 4" and alone[-3:] == ["", "", []]


def test_what_is_missing_or_empty_is_named_before_the_page_opens(tmp_path):
    with pytest.raises(ValueError, match="there is no answers file .*nowhere.jsonl"):
        find_source(str(tmp_path / "nowhere.jsonl"))
    path = answers(tmp_path, "pope", "random", ["yes", "no"])
    with pytest.raises(ValueError, match="there is no image folder .*nowhere"):
        find_source(str(path), image_folder=str(tmp_path / "nowhere"))
    source = find_source(str(path))
    path.write_text("")
    with pytest.raises(ValueError, match="there are no answers in it"):
        Run.read(str(path), source)


def test_a_file_from_elsewhere_needs_the_name_of_its_benchmark(tmp_path):
    there = answers(tmp_path, "pope", "random", ["yes", "no"])
    path = tmp_path / "mine.jsonl"
    path.write_text(there.read_text())
    with pytest.raises(ValueError, match="name it with --benchmark"):
        find_source(str(path))
    run = Run.read(str(path), find_source(str(path), "pope"))
    assert run.source.question(run.lines[0]) is not None and run.name == "mine.jsonl"
