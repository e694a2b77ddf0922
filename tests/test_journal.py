"""A journal's rows are on disk whole or absent, whatever happens."""

import errno
import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crpo_jax.errors import InputError
from crpo_jax.store import journal as journal_module
from crpo_jax.store.files import DiskFull, read_rows
from crpo_jax.store.journal import Journal


@settings(max_examples=25)
@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers()), max_size=4), st.integers(0, 400))
def test_a_file_cut_anywhere_keeps_its_read_rows(tmp_path_factory, rows, cut):
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    with Journal(path, {}) as journal:
        for row in rows:
            journal.append(row)
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    kept = data.count(b"\n")
    with Journal(path, {}) as journal:
        assert journal.rows == rows[:kept]
        journal.append({"new": 1})
    assert list(read_rows(path)) == [*rows[:kept], {"new": 1}]


def test_threads_write_whole_lines(tmp_path):
    with Journal(tmp_path / "rows.jsonl", {}) as journal:
        threads = [
            threading.Thread(target=lambda n=n: [journal.append({"n": n, "text": "x" * 3000}) for _ in range(5)])
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(row["n"] for row in read_rows(tmp_path / "rows.jsonl")) == sorted(list(range(8)) * 5)


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    real = os.write

    def half(fd, data):
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: len(data) // 2])

    with Journal(tmp_path / "rows.jsonl", {}) as journal:
        journal.append({"a": 1})
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(DiskFull, match="No space left on device"):
            journal.append({"b": "x" * 100})
        monkeypatch.undo()
        assert (tmp_path / "rows.jsonl").read_text() == '{"a": 1}\n'
        journal.append({"c": 3})
    assert list(read_rows(tmp_path / "rows.jsonl")) == [{"a": 1}, {"c": 3}]


def test_a_second_writer_is_refused(tmp_path):
    with Journal(tmp_path / "rows.jsonl", {}), pytest.raises(InputError, match="another process is writing"):
        Journal(tmp_path / "rows.jsonl", {})


def test_a_line_that_is_no_row_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
    with pytest.raises(InputError, match=r"rows.jsonl:2: expected a JSON object"):
        Journal(tmp_path / "rows.jsonl", {})


def test_a_reply_waits_for_room_on_a_full_disk(tmp_path, monkeypatch):
    real, slept = os.write, []
    monkeypatch.setattr(journal_module.time, "sleep", slept.append)

    def full_twice(fd, data):
        if len(slept) < 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    lines = []
    with Journal(tmp_path / "rows.jsonl", {}) as journal:
        monkeypatch.setattr(os, "write", full_twice)
        journal.append_or_wait({"a": 1}, lines.append)
    assert list(read_rows(tmp_path / "rows.jsonl")) == [{"a": 1}]
    assert len(slept) == len(lines) == 2
    assert all("No space left on device" in line and "waiting for room" in line for line in lines)
