"""Files are replaced whole, rows are read up to the last whole one, and write errors are one line."""

import json

import pytest

from crpo_jax.disk import replace_file
from crpo_jax.errors import Fault, InputError
from crpo_jax.store.files import RESUME_HINT, DiskFull, read_rows, replace_rows, writing


def test_a_file_is_replaced_at_once(tmp_path):
    replace_rows(tmp_path / "rows.jsonl", [{"a": "\ud800"}])
    replace_rows(tmp_path / "rows.jsonl", [{"b": 2}])
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [{"b": 2}]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_file_that_cannot_be_replaced_stays(tmp_path):
    path = tmp_path / "rows.jsonl"
    replace_rows(path, [{"a": 1}])
    (tmp_path / "rows.jsonl.new").mkdir()  # in the way of the temporary file
    with pytest.raises(
        DiskFull, match=r"rows.jsonl: cannot write \S+rows.jsonl.new: Is a directory; the file is unchanged$"
    ):
        replace_rows(path, [{"b": 2}])
    assert path.read_text() == '{"a": 1}\n'


def test_a_missing_file_has_no_rows(tmp_path):
    assert list(read_rows(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize(
    ("arguments", "error", "line"),
    [
        ((), Fault, f"X: cannot write FOLDER/file/inside.new: Not a directory; {RESUME_HINT}"),
        ((InputError, ""), InputError, "X: cannot write FOLDER/file/inside.new: Not a directory"),
    ],
)
def test_a_write_error_is_one_line(arguments, error, line, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(error) as caught, writing("X", *arguments):
        replace_file(tmp_path / "file" / "inside", b"")
    assert str(caught.value) == line.replace("FOLDER", str(tmp_path))
