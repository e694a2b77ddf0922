"""A file of JSON lines that survives whatever stops the program: a row is on disk whole, or it is not there."""

import contextlib
import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from crpo_jax.disk import make_folder, sync_folder
from crpo_jax.errors import InputError
from crpo_jax.store.files import DiskFull, check_in_place, encode_rows, read_rows, write_all, writing

DISK_PATIENCE = 600.0
"""Seconds for which a reply that was paid for waits for room on a full disk."""


class Journal:
    """Appends JSON objects and syncs them to the disk; a context manager.

    Opening the file cuts off a torn last line, which a power failure can leave, and keeps other processes out. `rows`
    are those that the file held then; InputError names one without the `fields`, or with another type in one of them.
    `append` may be called from several threads.
    """

    def __init__(self, path: Path, fields: Mapping[str, type]) -> None:
        self.path = path
        self._mutex = threading.Lock()
        with contextlib.ExitStack() as opened:
            with writing(path, InputError, hint=""):
                make_folder(path.parent)
                self._file = opened.enter_context(path.open("a+b", buffering=0))
                sync_folder(path.parent)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the file is closed
            except OSError:
                raise InputError(
                    f"{path}: another process is writing to it; wait until it ends, or choose another --workdir"
                ) from None
            self.rows = list(read_rows(path))
            for number, row in enumerate(self.rows, start=1):
                for name, kind in fields.items():
                    if not isinstance(row.get(name), kind):
                        raise InputError(
                            f"{path}:{number}: {name}: expected {kind.__name__}, got {row.get(name)!r:.60}; "
                            "remove the line, or choose another --workdir"
                        )
            with path.open("rb") as lines:
                self._end = sum(len(line) for line in lines if line.endswith(b"\n"))
            self._file.truncate(self._end)
            opened.pop_all()

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Appends all of the rows; DiskFull where they could not be written, and then none of them is there."""
        data = encode_rows(rows)
        check_in_place(self.path, self._file.fileno())
        with self._mutex, writing(self.path, DiskFull, "all earlier rows are kept"):
            try:
                write_all(self._file.fileno(), data)
                os.fsync(self._file.fileno())
            except OSError:
                with contextlib.suppress(OSError):  # cutting needs no room; if it fails, the next opening cuts
                    self._file.truncate(self._end)
                raise
            self._end += len(data)

    def append_or_wait(self, row: Mapping[str, Any], report: Callable[[str], None]) -> None:
        """Appends a reply that was paid for; where the disk is full, waits up to DISK_PATIENCE for room."""
        deadline = time.monotonic() + DISK_PATIENCE
        while True:
            try:
                return self.append(row)
            except DiskFull as error:
                if time.monotonic() > deadline:
                    raise
                report(f"{error}; waiting for room, and sending no requests meanwhile")
                time.sleep(DISK_PATIENCE / 60)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def request_key(*parts: Any) -> str:
    """The key of a reply: a digest of everything that its request depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
