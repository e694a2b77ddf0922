"""JSON lines that outlive whatever stops the program: a line is on disk whole, or it is not there."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from crpo_jax.errors import InputError

PATIENCE = 600.0  # seconds to wait for room on a full disk, with a reply in hand


class Full(Exception):
    """A line could not be written, and nothing of it is left: the disk is full, or the file's limit is reached."""


def whole_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file's whole lines; a last line without its line break was cut off and is none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise InputError(
                    f"{path}:{number}: expected a JSON object, got {line[:60]!r}; take the line out, or take another --workdir"
                )
            yield row


class Journal:
    """A file of JSON objects, appended one at a time and synced to the disk; a context manager.

    Opening it cuts off a torn last line, which a power cut can leave, and keeps other processes out. `rows` holds what the
    file held then. `append` may be called from several threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise InputError(f"{path}: cannot write: {error.strerror}") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise InputError(
                f"{path}: another process is writing to it; wait for its end, or take another --workdir"
            ) from None
        try:
            self.rows = list(whole_rows(path))
        except InputError:
            os.close(self._fd)
            raise
        self._end = last_line_break(path)
        os.ftruncate(self._fd, self._end)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """All of the rows, or none and Full where they do not fit."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        line = text.encode("utf-8", "backslashreplace")  # a lone surrogate as the JSON escape it came from
        with self._lock:
            try:
                written = 0
                while written < len(line):
                    written += os.write(self._fd, line[written:])
                os.fsync(self._fd)
            except OSError as error:
                with contextlib.suppress(
                    OSError
                ):  # a cut is no new data: it works on a full disk; if not, the next opening does it
                    os.ftruncate(self._fd, self._end)
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                    raise Full(f"{self.path}: {error.strerror}; what was written before is kept") from None
                raise
            self._end += len(line)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)  # which also gives up the lock


def key_of(*parts: Any) -> str:
    """What a kept reply is found by: a digest of all that was asked."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def keep(journal: Journal, row: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Appends a paid-for reply, waiting for room on a full disk before it is given up."""
    since = time.monotonic()
    while True:
        try:
            return journal.append(row)
        except Full as error:
            if time.monotonic() - since > PATIENCE:
                raise
            say(f"{error}: waiting for room, asking nothing meanwhile")
            time.sleep(min(10.0, PATIENCE / 10))


def last_line_break(path: Path) -> int:
    """The length of the file up to and with its last line break."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def replace_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """The whole file at once: another program sees the old one or the new one."""
    fresh = path.with_name(path.name + ".new")
    try:
        with fresh.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(fresh, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise Full(f"{path}: {error.strerror}; the file is as it was before") from None
