"""Lines of a file by number, and which of them to look at where they are too many."""

import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from crpo_jax.errors import InputError


class Lines:
    """The rows of a file of JSON lines, read one by one; only their places are in memory.

    A last line without its line break is being written, or was cut off: it is left out. `wanted` selects lines by their
    bytes.
    """

    def __init__(self, path: Path, wanted: Callable[[bytes], bool] = lambda line: True) -> None:
        self.path, self._starts, self._numbers = path, array("q"), array("q")
        start = 0
        with self._open() as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n") and wanted(line):
                    self._starts.append(start)
                    self._numbers.append(number)
                start += len(line)

    def _open(self) -> BinaryIO:
        """Opened for each reading: a run may have more evaluations than a process may have open files."""
        try:
            return self.path.open("rb")
        except OSError as error:
            raise InputError(f"{self.path}: expected a file of JSON lines, got: {error.strerror}") from None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, place: int) -> dict[str, Any]:
        with self._open() as file:
            file.seek(self._starts[place])
            line = file.readline()
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{self.path}:{self._numbers[place]}: expected a JSON object, got {line[:60]!r}")
        return row

    def group(self, place: int, most: int = 64) -> list[tuple[int, dict[str, Any]]]:
        """The neighbours of a row that answer the same question in the same step, with their places."""

        def key(row: dict[str, Any]) -> tuple[Any, Any]:
            return row.get("step"), row.get("id")

        rows = [(place, self[place])]
        for way in (-1, 1):
            other = place + way
            while 0 <= other < len(self) and len(rows) < most and key(row := self[other]) == key(rows[0][1]):
                rows.append((other, row))
                other += way
        return sorted(rows, key=lambda pair: pair[0])


def spread(count: int) -> Iterator[int]:
    """All places below `count`: the first, the last, then such that those so far are evenly spread at any time."""
    if count:
        yield 0
    if count > 1:
        yield count - 1
    bits = max(count - 1, 0).bit_length()
    for number in range(1, 1 << bits):
        place = int(f"{number:0{bits}b}"[::-1], 2)  # the bits in reverse: van der Corput's sequence
        if 0 < place < count - 1:
            yield place
