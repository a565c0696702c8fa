"""Files of records: what is read out of a table."""

import pytest

from llava.eval.files.records import read_table

#: what pandas 2 and 3 read as a missing cell
PANDAS = ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"]
PANDAS += ["<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"]


@pytest.mark.parametrize("cell", [*PANDAS, "NAN", "none", "NONE"])
def test_cells_that_pandas_or_llava_takes_for_missing_are_missing(cell, tmp_path):
    (tmp_path / "q.tsv").write_text(f"index\tA\tB\n1\t{cell}\tx\n")
    assert read_table(str(tmp_path / "q.tsv"), ("index",)) == [{"index": "1", "A": None, "B": "x"}]


@pytest.mark.parametrize("cell", ["Na", "na", "nil", "0", "no", " ", "None of them", "-"])
def test_other_cells_are_what_they_say(cell, tmp_path):
    (tmp_path / "q.tsv").write_text(f"index\tA\n1\t{cell}\n")
    assert read_table(str(tmp_path / "q.tsv"), ("index",)) == [{"index": "1", "A": cell}]
