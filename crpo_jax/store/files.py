"""Files of a workdir: replaced whole, appended to in whole JSON lines, and write errors in one line."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
        raise error_type(f"{subject}: cannot write: {error.strerror or error}{hint and f'; {hint}'}") from None


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a whole file at once: readers see the old content or the new one, and an OSError leaves the old one."""
    temporary = path.with_name(f"{path.name}.new")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_all(descriptor: int, data: bytes) -> None:
    """Writes every byte or raises an OSError: `os.write` alone may stop half-way on a disk that fills up."""
    while data:
        data = data[os.write(descriptor, data) :]


def encode_rows(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """JSON lines in UTF-8; a lone surrogate, which UTF-8 cannot hold, becomes its JSON escape."""
    # A question's column may hold what JSON cannot, such as the date of a table.
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    return "".join(lines).encode("utf-8", "backslashreplace")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines, none where there is no file; InputError names a line that is no object.

    A last line without its line break is one that a crash cut off, or that is being written: it is left out.
    """
    with path.open("rb") if path.exists() else contextlib.nullcontext(()) as lines:
        for number, line in enumerate(lines, start=1):  # bytes split at \n alone, text also at a response's U+2028
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError:
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
