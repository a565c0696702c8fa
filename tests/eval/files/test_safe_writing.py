"""A lock is held by one process, also when another one lets go of it at the wrong moment."""

import builtins
import os
import shutil
from types import SimpleNamespace

import pytest

from llava.eval.answering import answers_file
from llava.eval.answering.answers_file import AnswersFile
from llava.eval.files import safe_writing
from llava.eval.files.safe_writing import Lock, replace_file


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path):
    folder = str(tmp_path / "a.parts")
    lock = Lock("a.jsonl", folder)
    with pytest.raises(ValueError, match="another process is writing to a.jsonl"):
        Lock("a.jsonl", folder)
    lock.release()
    assert not os.path.exists(folder)
    Lock("a.jsonl", folder).release()


def test_what_others_left_in_the_folder_stays(tmp_path):
    lock = Lock("a.jsonl", str(tmp_path))
    (tmp_path / "0.jsonl").touch()
    lock.release()
    assert os.listdir(tmp_path) == ["0.jsonl"]


@pytest.mark.skipif(safe_writing.fcntl is None, reason="no locks on this system")
def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """The process before has removed file and folder between our opening the file and its lock."""
    folder, flock, calls = tmp_path / "a.parts", safe_writing.fcntl.flock, []

    def late(file, how):
        if not calls:
            shutil.rmtree(folder)
        calls.append(how)
        flock(file, how)

    monkeypatch.setattr(safe_writing.fcntl, "flock", late)
    lock = Lock("a.jsonl", str(folder))
    assert len(calls) == 2 and (folder / "lock").exists()
    with pytest.raises(ValueError, match="another process is writing"):
        Lock("a.jsonl", str(folder))
    lock.release()


def test_a_folder_that_goes_meanwhile_is_made_again(tmp_path, monkeypatch):
    folder, opened = tmp_path / "a.parts", []

    def late(name, mode):
        if not opened:
            folder.rmdir()
        opened.append(name)
        return builtins.open(name, mode)

    monkeypatch.setattr(safe_writing, "open", late, raising=False)
    Lock("a.jsonl", str(folder)).release()
    assert len(opened) == 2


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path, temporary = tmp_path / "a", tmp_path / "new"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        replace_file(str(path), "half \ud83d", str(temporary))
    assert path.read_text() == "before"
    replace_file(str(path), "after", str(temporary))
    assert path.read_text() == "after" and not temporary.exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named_with_the_file_and_the_lock_is_let_go(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.txt'"):
        replace_file(str(tmp_path / "a.txt"), "text", "/dev/full")
    path = str(tmp_path / "a.jsonl")
    full = SimpleNamespace(open=lambda name, mode, **kwargs: open("/dev/full", mode, **kwargs))
    with (
        pytest.raises(OSError, match="No space left on device: '.*full'"),
        AnswersFile(path, [{"question_id": 1}], {}) as answers,
    ):
        monkeypatch.setattr(answers_file, "open", full.open, raising=False)
        answers.put(0, {"question_id": 1, "text": "x"})
    monkeypatch.undo()
    with AnswersFile(path, [{"question_id": 1}], {}) as answers:
        assert answers.missing == [0]
