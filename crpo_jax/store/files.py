"""Files of a workdir: JSON objects, JSON lines that are appended whole, and write errors in one line."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from crpo_jax.disk import replace_file
from crpo_jax.errors import Fault, InputError

RESUME_HINT = "once that is fixed, the same command resumes from the last checkpoint"


class DiskFull(Fault):
    """Rows could not be written, and no part of them is left in the file."""


@contextlib.contextmanager
def writing(subject: object, error_type: type[Exception] = Fault, hint: str = RESUME_HINT) -> Iterator[None]:
    """Turns an OSError of the body into one line that begins with `subject`, a path or a flag with its value."""
    try:
        yield
    except OSError as error:
        path = error.filename if isinstance(error.filename, str) else ""
        place = f" {path}" if path and path not in str(subject) else ""
        raise error_type(f"{subject}: cannot write{place}: {error.strerror or error}{hint and f'; {hint}'}") from None


def write_all(descriptor: int, data: bytes) -> None:
    """Writes every byte or raises an OSError: `os.write` alone may stop half-way on a disk that fills up."""
    while data:
        data = data[os.write(descriptor, data) :]


def check_in_place(path: Path, descriptor: int) -> None:
    """Fault where an open file is no longer what its path names: what is written to it would be lost in silence."""
    with contextlib.suppress(OSError):  # nothing has this name any more
        if os.path.samestat(os.stat(path), os.fstat(descriptor)):
            return
    raise Fault(
        f"{path}: moved or deleted while it was being written; nothing is written elsewhere. "
        "The same command resumes where the folder is now, from what is in it"
    )


def read_object(path: Path, expected: str, way_out: str) -> dict[str, Any]:
    """The JSON object in a file; InputError says what was `expected` in it and the `way_out`."""
    data = b""
    try:
        data = path.read_bytes()
        if isinstance(content := json.loads(data), dict):
            return content
        problem = f"a {type(content).__name__}"
    except OSError as error:
        problem = error.strerror
    except (ValueError, RecursionError):  # ValueError: also bytes that are no UTF-8
        problem = f"{data[:60]!r}" if data.strip() else "an empty file"
    raise InputError(f"{path}: expected {expected}, got {problem}; {way_out}")


def encode_rows(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """JSON lines in UTF-8; a lone surrogate, which UTF-8 cannot hold, becomes its JSON escape."""
    # A question's column may hold what JSON cannot, such as the date of a table.
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    return "".join(lines).encode("utf-8", "backslashreplace")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, none where there is no file; InputError names a line that is no object.

    A last line without its line break is one that a crash cut off, or that is being written: it is left out.
    """
    if not path.exists():
        return
    try:
        opened = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: expected a file of JSON lines, got: {error.strerror}") from None
    with opened as lines:
        for number, line in enumerate(lines, start=1):  # bytes split at \n alone, text also at a response's U+2028
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise InputError(
                    f"{path}:{number}: expected a JSON object, got {line[:60]!r}; "
                    "remove the line, or choose another --workdir"
                )
            yield row


def replace_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a whole file of JSON lines at once; DiskFull leaves the old file."""
    with writing(path, DiskFull, "the file is unchanged"):
        replace_file(path, encode_rows(rows))
