"""Whatever happened to the files of a run, it ends in one sentence that names the file, or goes on
to what an undisturbed run writes; file systems without locks are no obstacle."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llava.eval.answering.answers_file import AnswersFile, Journal, folder, read_journals
from llava.eval.benchmarks import find_benchmark
from llava.eval.benchmarks import review_summary as summarize_gpt_review
from llava.eval.files import safe_writing
from llava.eval.files.answer_lines import read_answers, read_lines
from llava.eval.files.records import parse_json, read_json, read_jsonl, read_table
from llava.eval.score_table import read_score
from tests.eval import mini_benchmark

HEADS = [{"question_id": i, "prompt": f"What is {i}?"} for i in range(6)]
SETTINGS = {"model": "m", "config": {"rope_theta": 10000.0, "layers": [1, 2]}}
DEEP = "[" * 100_000 + "]" * 100_000
JUNK = [
    b"[1, 2]",
    b"7",
    b"null",
    b'"text"',
    b"{}",
    b'{"question_id": NaN, "text": "?"}',
    b'{"question_id": 1e999, "text": "?"}',
    b'{"question_id": -Infinity, "text": "?"}',
    b'{"question_id": ' + b"9" * 5000 + b', "text": "?"}',
    b'{"question_id": [1], "text": "?"}',
    b'{"question_id": true, "text": "?"}',
    b'{"question_id": 1}',
    b'{"question_id": 1, "text": null}',
    b'{"question_id": 1, "text": {"a": 1}}',
    b'{"question_id": 1, "error": 5}',
    b'{"question_id": 1, "text": "?", "metadata": 5}',
    b'{"question_id": 1, "text": "?", "metadata": {"visual_tokens": "many"}}',
    b'{"question_id": 1, "text": "?", "metadata": {"visual_tokens": true}}',
    b'{"question_id": 1, "text": "?", "metadata": {"visual_tokens_unpruned": 576}}',
    b"\xff\xfe\x00binary\x00",
    b'\xef\xbb\xbf{"question_id',
    b"",
    b"\x00" * 50,
    DEEP.encode(),
    b'{"question_id": 1, "text": "?", "metadata": ' + DEEP.encode() + b"}",
]


def line(head):
    return {**head, "text": f"answer {head['question_id']}", "metadata": {}}


def answer_all(path, stop_after=None, settings=SETTINGS):
    with AnswersFile(str(path), HEADS, settings) as file:
        for number in file.missing[:stop_after]:
            file.put(number, line(HEADS[number]))
        if not file.missing:
            file.finish()


def answer_in_any_order(path):
    with AnswersFile(str(path), HEADS, SETTINGS) as file:
        for number in (3, 1, 0, 5, 4, 2):
            if number not in file.known:
                file.put(number, line(HEADS[number]))
        file.finish()


WHOLE = "".join(json.dumps(line(head)) + "\n" for head in HEADS).encode()


def write_lines_in_order(path, count):
    """Leaves the first lines of an answers file, as other programs and earlier versions do."""
    answer_all(path, stop_after=1)
    shutil.rmtree(folder(str(path)))
    path.write_bytes(b"".join(WHOLE.splitlines(True)[:count]))


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk[:40]))
def test_a_broken_answer_is_named_with_file_and_line(junk, tmp_path):
    path = tmp_path / "a.jsonl"
    answer_all(path)
    lines = WHOLE.splitlines()
    path.write_bytes(b"\n".join([lines[0], junk, *lines[2:]]) + b"\n")
    with pytest.raises(ValueError, match=r"a.jsonl, line 2 is not an answer \(.+\): write to"):
        answer_all(path)
    if junk:  # readers of finished files pass over empty lines
        with pytest.raises(ValueError, match=r"a.jsonl, line 2: \S"):
            read_answers(str(path))


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk[:40]))
def test_a_broken_line_of_a_journal_is_named_with_file_and_line(junk, tmp_path):
    path = str(tmp_path / "a.jsonl")
    answer_all(path, stop_after=1)
    own = Journal(path, 3)
    own.put(3, line(HEADS[3]))
    own.put(2, line(HEADS[2]))
    own.close()
    name = os.path.join(folder(path), "3.jsonl")
    first, second = open(name, "rb").read().splitlines()
    for broken in (junk, b'{"number": 4, "line": ' + junk + b"}"):
        with open(name, "wb") as file:
            file.write(b"\n".join([first, broken, second]) + b"\n")
        with pytest.raises(ValueError, match=r"3.jsonl, line 2 is not an answer \(.+\): remove"):
            answer_in_any_order(path)


@pytest.mark.parametrize("number", ["-1", "1e999", "NaN", "1.5", '"1"', "true", "null", "[1]"])
def test_a_journal_does_not_take_strange_numbers_for_questions(number, tmp_path):
    path = str(tmp_path / "a.jsonl")
    answer_all(path, stop_after=1)
    entry = f'{{"number": {number}, "line": {json.dumps(line(HEADS[5]))}}}\n'
    with open(os.path.join(folder(path), "0.jsonl"), "w") as file:
        file.write(2 * entry)
    with pytest.raises(ValueError, match="0.jsonl, line 1 is not an answer"):
        answer_in_any_order(path)
    assert not read_journals(path, (), tolerant=True)


def test_other_files_in_the_folder_of_journals_are_left_alone(tmp_path):
    path = str(tmp_path / "a.jsonl")
    os.makedirs(os.path.join(folder(path), "sub.jsonl"))
    with open(os.path.join(folder(path), ".nfs0001"), "wb") as file:
        file.write(b"\0\n\0\n")
    answer_in_any_order(path)
    assert open(path, "rb").read() == WHOLE


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"5", b"null", b"{", b"\xff\xfe", DEEP.encode(), b'{"a": NaN}']
)
def test_broken_settings_are_named(content, tmp_path):
    path = tmp_path / "a.jsonl"
    answer_all(path, stop_after=2)
    (tmp_path / "a.settings.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.settings\.json"):
        answer_all(path)
    assert len(read_journals(str(path), ())) == 2  # nothing is lost
    write_lines_in_order(tmp_path / "b.jsonl", 3)
    (tmp_path / "b.settings.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.settings\.json"):
        answer_all(tmp_path / "b.jsonl")
    assert (tmp_path / "b.jsonl").read_bytes() == b"".join(WHOLE.splitlines(True)[:3])


def test_answers_of_unknown_settings_are_not_continued_and_complete_ones_left_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    answer_all(path, stop_after=3)
    (tmp_path / "a.settings.json").unlink()
    with pytest.raises(ValueError, match=r"a.settings.json, which says how they were made, is not"):
        answer_all(path)
    path.write_bytes(WHOLE)
    answer_all(path)
    assert path.read_bytes() == WHOLE


def test_a_changed_value_inside_the_settings_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    answer_all(path, stop_after=3)
    changed = {"model": "m", "config": {"rope_theta": 50000.0, "layers": [1, 2]}}
    sentence = "config.rope_theta was 10000.0 and is now 50000.0"
    with pytest.raises(ValueError, match=sentence):
        answer_all(path, settings=changed)
    long = {"model": "m" * 1000, "config": SETTINGS["config"]}
    with pytest.raises(ValueError) as error:
        answer_all(path, settings=long)
    assert len(str(error.value)) < 700


def spoiled(content: bytes, place: float, junk: bytes, drop: int) -> bytes:
    start = int(place * len(content))
    return content[:start] + junk + content[start + drop :]


SPOIL = {
    "place": st.floats(0, 1),
    "junk": st.one_of(st.binary(max_size=40), st.sampled_from(JUNK[:-2])),
    "drop": st.integers(0, 60),
}


@settings(max_examples=60, deadline=None)
@given(which=st.sampled_from(["answers", "journal", "settings"]), **SPOIL)
@example(which="journal", place=0.0, junk=b'{"number": Infinity, "line": {}}\n', drop=0)
@example(which="answers", place=1.0, junk=b"\0\0\0", drop=0)
def test_a_run_on_spoiled_files_ends_right_or_in_a_sentence(tmp_path_factory, which, **spoil):
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    write_lines_in_order(path, 2)
    own = Journal(str(path), 1)
    own.put(4, line(HEADS[4]))
    own.put(3, line(HEADS[3]))
    own.close()
    names = {
        "answers": path,
        "journal": path.with_suffix(".parts") / "1.jsonl",
        "settings": path.with_suffix(".settings.json"),
    }
    names[which].write_bytes(spoiled(names[which].read_bytes(), **spoil))
    try:
        answer_in_any_order(path)
    except ValueError as error:
        assert str(path.with_suffix("")) in str(error) and "\n" not in str(error)
    else:
        written = [json.loads(line.decode("utf-8-sig")) for line in path.read_bytes().splitlines()]
        assert [record["question_id"] for record in written] == list(range(6))
        assert all(isinstance(record["text"], str) for record in written)


@settings(max_examples=50, deadline=None)
@given(content=st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode)))
@example(content=DEEP.encode())
@example(content=b'"' + b"9" * 10)
@example(content=b"9" * 5000)
def test_readers_name_the_file_they_cannot_read(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("read") / "x.json"
    path.write_bytes(content)
    for read in (read_json, read_jsonl, read_table, read_score):
        try:
            read(str(path))
        except ValueError as error:
            assert "x.json" in str(error) and type(error) is ValueError


def test_a_mark_at_the_beginning_of_a_file_is_no_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "q.json").write_bytes(mark + b"[1]")
    (tmp_path / "q.jsonl").write_bytes(mark + b'{"a": 1}\n')
    (tmp_path / "q.tsv").write_bytes(mark + b"index\tA\n1\tx\n")
    assert read_json(str(tmp_path / "q.json")) == [1]
    assert read_jsonl(str(tmp_path / "q.jsonl")) == [{"a": 1}]
    assert read_table(str(tmp_path / "q.tsv"), ("index",)) == [{"index": "1", "A": "x"}]
    path = tmp_path / "a.jsonl"
    write_lines_in_order(path, 2)
    path.write_bytes(mark + path.read_bytes())
    answer_all(path)
    assert path.read_bytes() == WHOLE


def test_numbers_must_be_finite():
    assert parse_json(b'{"a": 1.5e3}') == {"a": 1500.0}
    for text in ("NaN", "[Infinity]", "1e400", "-1e400"):
        with pytest.raises(ValueError, match="not valid JSON"):
            parse_json(text)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_once(code, tmp_path, monkeypatch):
    class NoLocks:
        LOCK_EX, LOCK_NB = 2, 4

        @staticmethod
        def flock(*_):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(safe_writing, "fcntl", NoLocks)
    safe_writing.warn_of_no_locks.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for name in ("a", "b", "c"):
            answer_all(tmp_path / f"{name}.jsonl")
            assert (tmp_path / f"{name}.jsonl").read_bytes() == WHOLE
    assert len(seen) == 1 and "has no locks" in str(seen[0].message)


def test_another_failure_of_a_lock_is_one_sentence(tmp_path, monkeypatch):
    class Broken:
        LOCK_EX, LOCK_NB = 2, 4

        @staticmethod
        def flock(*_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(safe_writing, "fcntl", Broken)
    with pytest.raises(ValueError, match="cannot lock .*a.jsonl: Input/output error"):
        answer_all(tmp_path / "a.jsonl")


def test_a_file_that_cannot_be_synced_is_written_all_the_same(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(safe_writing.os, "fsync", fsync)
    answer_in_any_order(tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == WHOLE


@pytest.mark.parametrize("junk", [b"[1]", b'{"question_id": 1}', DEEP.encode(), b"\xff"])
def test_a_program_on_a_broken_file_ends_with_one_line(junk, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(junk + b"\n")
    command = [sys.executable, "-m", "llava.eval.score", "gqa", "--data-dir"]
    command += ["playground/benchmark", "--answers-file", str(tmp_path / "a.jsonl")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path}/a.jsonl, line 1: ")


# --- files with the right answers, and fields of answers that only one benchmark has -------------


def answered(folder, name):
    """A benchmark of two questions: (benchmark, its JSON files, lines of an answers file)."""
    benchmark = find_benchmark(name)
    files = [folder / file for file in (benchmark.questions, *benchmark.truth)]
    files = [file for place in files for file in (sorted(place.glob("*.json")) or [place])]
    questions = benchmark.select(benchmark.read(str(files[0])))
    lines = [question.answer_line("A", "id", "m") for question in questions]
    return benchmark, [file for file in files if file.suffix.startswith(".json")], lines


def score_of(benchmark, folder, lines):
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = benchmark.read(str(folder / benchmark.questions))
    return benchmark.score(str(folder), asked, read_lines(str(path))).result()


@pytest.mark.parametrize("name", mini_benchmark.NAMED)
def test_a_file_of_another_form_is_named(name, tmp_path):
    folder = mini_benchmark.build(tmp_path / "data")
    benchmark, files, lines = answered(folder, name)
    assert score_of(benchmark, folder, lines)["count"] == 2
    for file in files[name != "mmbench" :] or files:
        whole = file.read_bytes()
        for junk in (
            "null",
            "5",
            "[]",
            "[[]]",
            '{"data": 5}',
            '{"annotations": [{}]}',
            '{"7": {}}',
        ):
            file.write_text(junk)
            with pytest.raises(ValueError, match=rf"{re.escape(file.name)}|answers.jsonl"):
                score_of(benchmark, folder, lines)
        file.write_bytes(whole)


@pytest.mark.parametrize("junk", [None, 5, {}, [[]], [None], {"a": 1}, True, "x", ["A"]])
@pytest.mark.parametrize("field", ["options", "option_char", "round_id"])
def test_a_broken_field_of_an_answer_is_named(field, junk, tmp_path):
    folder = mini_benchmark.build(tmp_path / "data")
    benchmark, _, lines = answered(folder, "mmbench")
    with pytest.raises(ValueError, match=r"answers.jsonl"):
        score_of(benchmark, folder, [lines[0], {**lines[1], field: junk}])


def test_a_file_without_answers_has_no_score(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match="a.jsonl: there are no answers in it"):
        read_answers(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    "junk", [{}, {"tuple": None}, {"tuple": ["a", {}]}, {"score": [1, 2, 3]}, {"tuple": [1, True]}]
)
def test_a_review_without_two_scores_is_named(junk, tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"question_id": 1} | junk))
    with pytest.raises(ValueError, match="r.jsonl, line 1: no review with two scores"):
        summarize_gpt_review.summarize(read_jsonl(str(tmp_path / "r.jsonl")))
