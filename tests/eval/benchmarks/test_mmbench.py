"""MMBench: circular and plain accuracy of tables that hold the rotations as rows [B2]."""

import random

import pytest

from llava.eval.answering.questions import subset
from llava.eval.benchmarks import find_benchmark
from llava.eval.benchmarks import mmbench as eval_mmbench
from llava.eval.benchmarks.mmbench import mmbench_question, mmbench_questions, read_mmbench
from tests.eval import mini_benchmark


def rotations(index, options, right):
    """The rows of a question, and the letter that is right in each."""
    for k in range(len(options)):
        shown = options[k:] + options[:k]
        letter = "ABCD"[shown.index(right)]
        row = {"index": str(index + k * 10**6), "answer": letter, "category": f"c{index}"}
        yield row, shown


def mmbench_case(num_right):
    """Two questions of four rows; the second is answered right in `num_right` of them."""
    rows, answers = [], []
    for index in (1, 2):
        for k, (row, shown) in enumerate(rotations(index, ["p", "q", "r", "s"], "q")):
            right = index == 1 or k < num_right
            wrong = "A" if row["answer"] != "A" else "B"
            line = {"question_id": int(row["index"]), "text": row["answer"] if right else wrong}
            rows.append(row)
            answers.append(line | {"options": shown, "option_char": list("ABCD")})
    return rows, answers


def test_b2_mmbench_is_right_where_all_rotations_of_a_question_are():
    rows, answers = mmbench_case(1)
    random.Random(0).shuffle(answers)
    units = eval_mmbench.units(rows, answers)
    result = units.result()
    assert result["plain"] == 62.5 and result["circular"] == result["score"] == 50.0
    assert result["metric"] == "circular accuracy"
    assert (result["count"], result["rows"]) == (2, 8)
    text = eval_mmbench.report(units)
    assert "Circular accuracy: 50.00%" in text and "Plain accuracy: 62.50%" in text
    assert "c1: 100.00%" in text and "c2: 0.00%" in text
    assert eval_mmbench.units(rows, answers * 2).result() == result


def test_mmbench_has_no_circular_accuracy_when_a_rotation_was_not_asked():
    rows, answers = mmbench_case(4)
    units = eval_mmbench.units(rows, answers[:-1])
    result = units.result()
    assert result["circular"] is None and result["metric"] == "plain accuracy"
    assert "not known: question 2 was not asked with all rotations" in eval_mmbench.report(units)
    single = eval_mmbench.units([rows[0], rows[4]], [answers[0], answers[4]]).details
    assert single["circular"] is None and single["plain"] == 100


def test_mmbench_rotates_a_table_without_rotations_itself():
    rows = [{"index": "1", "answer": "A", "category": "x"}]
    first = {"question_id": 1, "text": "A", "options": ["p", "q"], "option_char": ["A", "B"]}
    second = first | {"text": "B", "options": ["q", "p"], "option_char": ["B", "A"]}
    assert eval_mmbench.units(rows, [first, second]).details["circular"] == 100
    half = eval_mmbench.units(rows, [first, second | {"text": "A"}]).details
    assert (half["circular"], half["plain"]) == (0, 50)


def test_mmbench_names_a_row_without_an_answer_and_an_answer_without_a_row(tmp_path):
    table = tmp_path / "test.tsv"
    table.write_text("index\tanswer\n1\tA\n2\t\n")
    with pytest.raises(ValueError, match="row 2 has no right answer: only the development split"):
        eval_mmbench.read_rows(str(table))
    rows, answers = mmbench_case(4)
    with pytest.raises(ValueError, match="question 2000002 is not in"):
        eval_mmbench.units(rows[:-2], answers)


def test_a_limit_keeps_the_rotations_of_a_question_together():
    rows = [{"index": str(n + k * 10**6)} for k in range(4) for n in range(10)]
    chosen = subset(rows, 8, mmbench_question)
    assert sorted(int(row["index"]) % 10**6 for row in chosen) == [0] * 4 + [1] * 4
    assert len(subset(rows, 16, mmbench_question)) == 16
    assert subset(rows[:10], 4, mmbench_question) == subset(rows[:10], 4)
    with pytest.raises(ValueError, match="limit of 0"):
        subset(rows, 0, mmbench_question)


def test_an_upload_of_all_rounds_holds_the_answers_to_the_rows_as_they_stand():
    row = {"index": "1", "question": "?", "A": "p", "B": "q", "C": None, "D": None, "answer": "A"}
    first = {"question_id": "1", "text": "A", "option_char": ["A", "B"]}
    second = first | {"text": "B", "option_char": ["B", "A"]}
    names, cells = eval_mmbench.upload([row], [first, second])
    assert dict(zip(names, cells, strict=True))["prediction"] == "A"


def test_a_rotation_may_name_the_row_that_has_its_picture(tmp_path):
    table = tmp_path / "dev.tsv"
    lines = ["index\tquestion\tA\tB\timage", "1\t?\tp\tq\tUklG", "1000001\t?\tq\tp\t1"]
    table.write_text("\r\n".join(lines))
    assert [row["image"] for row in read_mmbench(str(table))] == ["UklG", "UklG"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"option_char": None}, "question 1 has no field 'option_char'"),
        ({"options": ["p"]}, "question 1 was shown 1 options with 4 letters"),
    ],
)
def test_mmbench_names_an_answer_that_does_not_say_what_was_shown(change, message):
    rows, answers = mmbench_case(4)
    broken = {key: value for key, value in (answers[0] | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        eval_mmbench.units(rows, [broken, *answers[1:]])


def test_a_table_without_rotations_is_scored_circularly_when_all_rounds_were_asked(tmp_path):
    data, benchmark = mini_benchmark.build(tmp_path), find_benchmark("mmbench")
    path = str(data / benchmark.questions)
    rounds = [q for row in benchmark.read(path) for q in mmbench_questions(row, all_rounds=True)]
    answers = [q.answer_line("A", "id", "m") for q in rounds]  # right in the first round only
    result = benchmark.score(str(data), benchmark.read(path), answers, None).result()
    assert (result["circular"], result["plain"], result["rows"]) == (0, 50, 4)
    assert result["metric"] == "circular accuracy"
    first = [answer for answer in answers if answer["round_id"] == 0]
    assert benchmark.score(str(data), benchmark.read(path), first, None).details["circular"] is None
