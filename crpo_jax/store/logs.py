"""What a run leaves to read: metrics.jsonl, samples.jsonl, TensorBoard, and the line that says what is happening."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from crpo_jax.errors import Fault

LOGS = ("metrics.jsonl", "samples.jsonl")


class Log:
    """Appends one object per step to metrics.jsonl and TensorBoard, and scored responses to samples.jsonl.

    A run that resumes after `done` steps drops what stands beyond the `sizes` the files had then: it is about to write
    those steps again, the same. So no step is there twice, and a line cut off by a crash is gone.
    """

    def __init__(
        self, workdir: Path, done: int = 0, sizes: Mapping[str, int] | None = None, *, writes: bool = True
    ) -> None:
        self._writes = writes
        if not writes:
            return
        with told(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            self._metrics, self._samples = (self._reopened(workdir / name, (sizes or {}).get(name, 0)) for name in LOGS)
            (workdir / "tb").mkdir(exist_ok=True)
            self._board = EventsWriter(
                str(workdir / "tb" / "events"), f".{os.getpid()}"
            )  # in this thread: the library's own hangs on a full disk
            self._board.write_event(
                Event(step=done, session_log=SessionLog(status=SessionLog.START))
            )  # TensorBoard drops what came after

    @staticmethod
    def _reopened(path: Path, size: int) -> BinaryIO:
        file = path.open("ab", buffering=0)  # a line that did not fit on the disk must not wait in a buffer
        file.truncate(size)
        return file

    def step(self, step: int, values: Mapping[str, float]) -> None:
        if self._writes:
            measured = {
                name: value if math.isfinite(value) else None for name, value in values.items()
            }  # JSON has no NaN
            append(self._metrics, json.dumps({"step": step, **measured}) + "\n")
            scalars = [
                Summary.Value(tag=name, simple_value=value) for name, value in measured.items() if value is not None
            ]
            with told(Path(self._metrics.name).parent / "tb"):
                self._board.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
                self._board.flush()

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._writes:
            append(self._samples, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writes:
            self._metrics.close()
            self._samples.close()
            with (
                told(Path(self._metrics.name).parent / "tb") if kind is None else contextlib.suppress(OSError)
            ):  # else one line is said already
                self._board.close()


@contextlib.contextmanager
def told(path: str | Path) -> Iterator[None]:
    """An OSError while writing `path` as a Fault of one line."""
    try:
        yield
    except OSError as error:
        raise Fault(
            f"{path}: {error.strerror or error}; once that is mended, the same command goes on from the last checkpoint"
        ) from None


def append(file: BinaryIO, text: str) -> None:
    """Writes the whole text or raises a Fault; what a full disk took of it is dropped when the run resumes."""
    data = memoryview(text.encode())
    with told(file.name):
        while data:
            data = data[file.write(data) :]


def evaluated(workdir: Path) -> dict[int, float]:
    """eval/mean, the mean reward of the held-out responses, by the step it was measured at."""
    path, found = workdir / "metrics.jsonl", {}
    with path.open(encoding="utf-8") if path.exists() else contextlib.nullcontext(()) as lines:
        for line in lines:
            if '"eval/mean"' in line and line.endswith("\n"):
                row = json.loads(line)
                if row["eval/mean"] is not None:
                    found[row["step"]] = row["eval/mean"]
    return found


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that end in a line break; a last one cut off by a crash is left out."""
    return [
        line + "\n" for line in path.read_text(encoding="utf-8").split("\n")[:-1]
    ]  # splitlines would also cut at a response's U+2028


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """Every step of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in whole_lines(path)] if path.exists() else []
