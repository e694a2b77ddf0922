"""Rows on disk: whole or absent, whatever happens."""

import errno
import json
import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crpo_jax.errors import InputError
from crpo_jax.store.journal import Full, Journal, replace_rows, whole_rows


@settings(max_examples=25)
@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers()), max_size=4), st.integers(0, 400))
def test_a_file_cut_anywhere_keeps_its_whole_rows(tmp_path_factory, rows, cut):
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    with Journal(path) as journal:
        for row in rows:
            journal.append(row)
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    kept = data.count(b"\n")
    with Journal(path) as journal:
        assert journal.rows == rows[:kept]
        journal.append({"new": 1})
    assert list(whole_rows(path)) == [*rows[:kept], {"new": 1}]


def test_threads_write_whole_lines(tmp_path):
    with Journal(tmp_path / "rows.jsonl") as journal:
        threads = [
            threading.Thread(target=lambda n=n: [journal.append({"n": n, "text": "x" * 3000}) for _ in range(5)])
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(row["n"] for row in whole_rows(tmp_path / "rows.jsonl")) == sorted(list(range(8)) * 5)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    real = os.write

    def half(fd, data):
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: len(data) // 2])

    with Journal(tmp_path / "rows.jsonl") as journal:
        journal.append({"a": 1})
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(Full, match="No space left on device"):
            journal.append({"b": "x" * 100})
        monkeypatch.undo()
        assert (tmp_path / "rows.jsonl").read_text() == '{"a": 1}\n'
        journal.append({"c": 3})
    assert list(whole_rows(tmp_path / "rows.jsonl")) == [{"a": 1}, {"c": 3}]


def test_a_second_writer_is_refused(tmp_path):
    with Journal(tmp_path / "rows.jsonl"), pytest.raises(InputError, match="another process is writing"):
        Journal(tmp_path / "rows.jsonl")


def test_a_line_that_is_no_row_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
    with pytest.raises(InputError, match=r"rows.jsonl:2: expected a JSON object"):
        Journal(tmp_path / "rows.jsonl")


def test_a_file_is_replaced_at_once(tmp_path):
    replace_rows(tmp_path / "rows.jsonl", [{"a": "\ud800"}])
    replace_rows(tmp_path / "rows.jsonl", [{"b": 2}])
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [{"b": 2}]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
