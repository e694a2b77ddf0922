"""What a run logs: metrics.jsonl, samples.jsonl, and the same metrics for TensorBoard."""

import contextlib
import json
import math
import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from crpo_jax.disk import make_folder, sync_file, sync_folder
from crpo_jax.store.event_file import EventFile
from crpo_jax.store.files import check_in_place, encode_rows, write_all, writing

LOGS = ("metrics.jsonl", "samples.jsonl")


class Log:
    """Appends one object per step to metrics.jsonl and TensorBoard, and scored responses to samples.jsonl.

    A run that resumes after `done` steps first drops the rows of later steps: it will write those steps again, with the
    same content. So no step is there twice, and a line cut off by a crash is gone. A file with fewer bytes than the
    `sizes` that the logs had then was cut or deleted since: that is said, and the run goes on.
    """

    def __init__(
        self, workdir: Path, done: int = 0, sizes: Mapping[str, int] | None = None, *, writer: bool = True
    ) -> None:
        self._workdir, self._writer, self._files = workdir, writer, dict[str, BinaryIO]()
        if not writer:
            return
        with writing(workdir):
            make_folder(workdir / "tb", parents=True)
            for name in LOGS:
                path, expected = workdir / name, (sizes or {}).get(name, 0)
                self._files[name] = path.open("ab", buffering=0)
                if (size := drop_later_rows(path, done)) < expected:
                    print(
                        f"{path}: {size:,} bytes instead of {expected:,}: lines of earlier steps are missing, "
                        "and the run goes on without them",
                        file=sys.stderr,
                    )
            sync_folder(workdir)
            self._events = EventFile(workdir / "tb", done)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the metrics of a step; one that is not finite is null in JSON and absent in TensorBoard."""
        if not self._writer:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append("metrics.jsonl", [{"step": step, **finite}])
        with writing(self._events.path):
            self._events.add_scalars(step, {name: value for name, value in finite.items() if value is not None})

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs the scored responses of a step."""
        if self._writer:
            self._append("samples.jsonl", rows)

    def check_in_place(self) -> None:
        """Fault where the workdir, or one of the files, was moved or deleted since the run opened it."""
        for name, file in self._files.items():
            check_in_place(self._workdir / name, file.fileno())

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends all rows or raises a Fault; the part that fitted on a full disk is dropped when the run resumes."""
        with writing(self._files[name].name):
            write_all(self._files[name].fileno(), encode_rows(rows))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer:
            for file in self._files.values():
                file.close()
            with writing(self._events.path) if kind is None else contextlib.suppress(OSError):  # else it was reported
                self._events.close()


def drop_later_rows(path: Path, done: int) -> int:
    """Cuts a log behind its last row of a step before `done`, and with it a torn last line; the bytes that are left."""
    with path.open("r+b") as file:
        if not (end := os.fstat(file.fileno()).st_size):
            return 0
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1
            while end and not step_of(content[(start := content.rfind(b"\n", 0, end - 1) + 1) : end]) < done:
                end = start
        file.truncate(end)
        return end


def step_of(line: bytes) -> float:
    """The step of a row of a log; infinite where the line is no such row."""
    try:
        return json.loads(line)["step"] + 0
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf


def sync_logs(workdir: Path, sizes: Mapping[str, int]) -> None:
    """Forces the logs to the disk; OSError where one has fewer bytes than `sizes` says."""
    for name, size in sizes.items():
        path = workdir / name
        if size:
            sync_file(path)
            if path.stat().st_size < size:
                raise OSError(f"{name} was cut while the run went on")
    for path in (workdir / "tb").glob("*"):
        if path.is_file():  # profilers put folders there
            sync_file(path)
