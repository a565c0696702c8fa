"""What lies beside answers, and what becomes of it when the answers are made anew."""

import numpy as np
import pytest

from llava.eval.answering.answers_file import AnswersFile
from llava.eval.files.mask_files import mask_path, write_mask
from llava.eval.files.side_files import side_files


def test_answers_that_are_made_anew_take_along_what_was_said_of_the_old(tmp_path, capsys):
    path = tmp_path / "n_64[1].jsonl"  # a name that is a pattern as well
    for name in ("n_64[1]_judge-0.5000.jsonl", "n_64[1]_info.json", "n_64[1].score.json"):
        (tmp_path / name).touch()
    write_mask(np.ones((2, 2), bool), mask_path(str(path), 0))
    names = ("n_641_info.json", "n_64[1]0_judge-0.5000.jsonl", "n_64[1]_some=-0.5.jsonl")
    names += ("n_64[1]_twig=-models-llava-1.5-7b.jsonl", "n_64[1]_judge-0.5_x.jsonl")
    others = [tmp_path / name for name in names]
    for other in others:
        other.touch()
    with AnswersFile(str(path), [{"question_id": 1}], {}) as answers:
        answers.put(0, {"question_id": 1, "text": "yes"})
        answers.finish()
    assert len(side_files(str(path))) == 4
    with AnswersFile(str(path), [{"question_id": 1}], {}, overwrite=True):
        pass
    assert side_files(str(path)) == [] and all(other.exists() for other in others)
    assert "removed with the old answers of" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["A\x1d", "=A1", "+1", "plain"])
def test_a_sheet_holds_every_answer_as_a_text(text, tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    from llava.eval.files.writing import write_xlsx

    path = str(tmp_path / "upload.xlsx")
    write_xlsx([["index", "prediction"], [7, text]], path)
    book = openpyxl.load_workbook(path, data_only=True)
    rows = [list(row) for row in book.active.iter_rows(values_only=True)]
    assert rows == [["index", "prediction"], [7, text.replace("\x1d", "")]]
