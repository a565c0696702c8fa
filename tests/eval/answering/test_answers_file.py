"""Question files are checked line by line; answers files survive any interruption."""

import json
import os
import shutil

import pytest

from llava.eval.answering.answers_file import AnswersFile, Journal, folder
from llava.eval.answering.questions import get_chunk
from llava.eval.benchmarks.mmbench import mmbench_questions
from llava.eval.files import records
from llava.eval.files.fingerprints import fingerprint

HEADS = [{"question_id": i, "prompt": f"What is {i}?"} for i in range(6)]
SETTINGS = {"model": "m", "pruner": "Pruner()"}


def line(head):
    return {**head, "text": f"answer {head['question_id']}", "metadata": {}}


def answer_all(path, heads=HEADS, settings=SETTINGS, stop_after=None, **options):
    """Answers question after question; returns how many answers were there before."""
    with AnswersFile(str(path), heads, settings, **options) as answers:
        done = len(answers.known)
        for number in answers.missing[:stop_after]:
            answers.put(number, line(heads[number]))
        if not answers.missing:
            answers.finish()
        return done


@pytest.fixture
def undisturbed(tmp_path):
    answer_all(tmp_path / "whole.jsonl")
    return (tmp_path / "whole.jsonl").read_bytes()


def test_a_finished_run_leaves_the_answers_and_their_settings_only(tmp_path):
    for _ in range(2):
        answer_all(tmp_path / "a.jsonl")
        assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "a.settings.json"}


def test_the_file_appears_whole(tmp_path, undisturbed):
    path = tmp_path / "a.jsonl"
    with AnswersFile(str(path), HEADS, SETTINGS) as answers:
        for number in (5, 2, 0, 1, 4, 3):
            answers.put(number, line(HEADS[number]))
            assert not path.exists()
        answers.finish()
    assert path.read_bytes() == undisturbed


def test_answers_already_there_are_not_written_again(tmp_path, undisturbed):
    path = tmp_path / "a.jsonl"
    answer_all(path)
    before = path.stat()
    answer_all(path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_partial_file_and_journals_of_an_earlier_version_are_continued(tmp_path, undisturbed):
    """They wrote the answers file as it grew, and into journals only what was ahead of its turn."""
    path = tmp_path / "a.jsonl"
    answer_all(path, stop_after=1)
    shutil.rmtree(folder(str(path)))
    path.write_bytes(b"".join(undisturbed.splitlines(True)[:2]) + b'{"question_id": 2, "pro')
    ahead = Journal(str(path), 1)
    ahead.put(4, line(HEADS[4]))
    ahead.close()
    with AnswersFile(str(path), HEADS, SETTINGS) as answers:
        assert answers.missing == [2, 3, 5]
        answers.put(3, line(HEADS[3]))
    assert answer_all(path) == 4
    assert path.read_bytes() == undisturbed
    assert not os.path.exists(folder(str(path)))


def test_answers_of_plain_llava_are_continued_where_that_is_asked_for(tmp_path, undisturbed):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(undisturbed.splitlines(True)[:2]))
    with pytest.raises(ValueError, match="which says how they were made, is not there"):
        answer_all(path)
    assert answer_all(path, foreign=True) == 2
    assert path.read_bytes() == undisturbed
    assert answer_all(path) == 6  # complete ones are left alone


def test_a_run_cut_anywhere_continues_to_the_same_file(tmp_path, undisturbed):
    path = tmp_path / "a.jsonl"
    ends = [i for i, byte in enumerate(undisturbed) if byte == ord("\n")]
    for length in {0, 7, 100, *ends, *(end + 1 for end in ends), len(undisturbed) - 5}:
        answer_all(path, overwrite=True)
        os.truncate(path, length)
        done = answer_all(path)
        assert done == undisturbed[:length].count(b"\n")
        assert path.read_bytes() == undisturbed


def test_a_stopped_run_is_continued_and_a_finished_one_left_alone(tmp_path, undisturbed):
    path = tmp_path / "sub" / "folder" / "a.jsonl"
    answer_all(path, stop_after=2)
    assert answer_all(path) == 2
    assert answer_all(path) == len(HEADS)
    assert path.read_bytes() == undisturbed


def test_a_garbled_last_line_is_passed_over_and_one_in_the_middle_is_named(tmp_path, undisturbed):
    path = tmp_path / "a.jsonl"
    for garbled in (path, tmp_path / "a.parts" / "0.jsonl"):
        answer_all(path, overwrite=True, stop_after=3)
        with open(garbled, "ab") as file:
            file.write(b"\0\0\0\n")
        assert answer_all(path, stop_after=1) == 3
        assert answer_all(path) == 4
        assert path.read_bytes() == undisturbed
    path.write_bytes(undisturbed.replace(b'"answer 1"', b'"answ'))
    with pytest.raises(ValueError, match="a.jsonl, line 2 is not an answer"):
        answer_all(path)


def test_answers_to_other_questions_are_not_continued(tmp_path):
    path = tmp_path / "a.jsonl"
    answer_all(path)
    other = [HEADS[0], HEADS[1] | {"prompt": "Something else?"}, *HEADS[2:]]
    with pytest.raises(ValueError, match="line 2 .* belongs to other questions.*--overwrite"):
        answer_all(path, other)
    with pytest.raises(ValueError, match="6 answers to 2 questions"):
        answer_all(path, HEADS[:2])


def test_answers_made_with_other_settings_are_not_continued(tmp_path, undisturbed):
    path = tmp_path / "a.jsonl"
    answer_all(path, stop_after=2)
    changed = SETTINGS | {"pruner": "Random(visual_token_num=64)"}
    with pytest.raises(ValueError, match=r"pruner was 'Pruner\(\)' and is now 'Random"):
        answer_all(path, settings=changed)
    assert answer_all(path, settings=changed, overwrite=True) == 0
    assert path.read_bytes() == undisturbed


def test_other_weights_have_another_fingerprint(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(100_000) + b"a")
    before = fingerprint(str(tmp_path))
    (tmp_path / "notes.txt").write_text("no weights")
    assert fingerprint(str(tmp_path)) == before
    weights.write_bytes(bytes(100_000) + b"b")
    assert fingerprint(str(tmp_path)) != before
    assert fingerprint("liuhaotian/llava-v1.5-7b") == "liuhaotian/llava-v1.5-7b"


def test_two_processes_cannot_write_one_file(tmp_path):
    path = str(tmp_path / "a.jsonl")
    with AnswersFile(path, HEADS, SETTINGS):
        with pytest.raises(ValueError, match="another process is writing"):
            AnswersFile(path, HEADS, SETTINGS)
        with pytest.raises(ValueError, match="another process is writing"):
            AnswersFile(path, HEADS, SETTINGS, overwrite=True)


def test_a_bare_file_name_needs_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert answer_all("answer.jsonl") == 0


@pytest.mark.parametrize(
    "broken, reason",
    [
        ('{"question_id": 2, "text": "no end', "not valid JSON"),
        ("[1, 2]", "expected an object, found list"),
        ('{"question_id": 2}', "no field 'text'"),
        ('{"question_id": 2, "text": "\udce9"}', "not valid UTF-8"),
    ],
)
def test_a_broken_question_line_is_named(tmp_path, broken, reason):
    path = tmp_path / "q.jsonl"
    good = json.dumps({"question_id": 1, "text": "?"})
    path.write_bytes(f"{good}\n\n{broken}\n{good}\n".encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"q.jsonl, line 3: {reason}"):
        records.read_jsonl(path, ("question_id", "text"))


def test_a_broken_table_row_and_a_missing_column_are_named(tmp_path):
    path = tmp_path / "q.tsv"
    path.write_text("index\tquestion\tA\tB\timage\n1\tq\ta\tb\tx\n2\tq\ta\n")
    with pytest.raises(ValueError, match="line 3: 3 cells where the header has 5"):
        records.read_table(path)
    path.write_text("index\tquestion\tA\timage\n")
    with pytest.raises(ValueError, match="line 1: no column B"):
        records.read_table(path)


def test_a_broken_item_of_a_list_is_named(tmp_path):
    path = tmp_path / "q.json"
    path.write_text('[{"id": "1"}, {}]')
    with pytest.raises(ValueError, match="item 2: no field 'id'"):
        records.read_json_list(path, ("id",))
    path.write_text('[{"id": "1"},\n {"id"]')
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        records.read_json_list(path, ("id",))


def test_options_stop_at_the_first_missing_cell(tmp_path):
    path = tmp_path / "q.tsv"
    path.write_text(
        "index\tquestion\thint\tA\tB\tC\tD\timage\n"
        '7\t"two\nlines"\tnan\tred\tNone\tblue\t\tx\n8\tq\th\t1\t2\t3\t\tx\n'
    )
    rows = records.read_table(path)
    first, second = (next(mmbench_questions(row)) for row in rows)
    assert first.text == "two\nlines\nA. red"
    assert second.text == "h\nq\nA. 1\nB. 2\nC. 3"
    assert second.head["question_id"] == 8


def test_chunks_cover_everything_once_and_late_ones_are_empty():
    chunks = [get_chunk(list(range(5)), 4, k) for k in range(4)]
    assert chunks == [[0, 1], [2, 3], [4], []]
    with pytest.raises(ValueError, match="chunk 4 of 4"):
        get_chunk([1], 4, 4)
