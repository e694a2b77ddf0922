"""What a run logs: metrics.jsonl, samples.jsonl, and the same metrics for TensorBoard."""

import contextlib
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue] (generated)
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from crpo_jax.store.files import encode_rows, read_rows, write_all, writing

LOGS = ("metrics.jsonl", "samples.jsonl")


class Log:
    """Appends one object per step to metrics.jsonl and TensorBoard, and scored responses to samples.jsonl.

    A run that resumes after `done` steps first drops whatever lies beyond the `sizes` that the files had then: it will
    write those steps again, with the same content. So no step is there twice, and a line cut off by a crash is gone.

    TensorBoard's events are written record by record: the thread behind tensorboardX's SummaryWriter dies of a full
    disk, and the run would then wait for it forever.
    """

    def __init__(
        self, workdir: Path, done: int = 0, sizes: Mapping[str, int] | None = None, *, writer: bool = True
    ) -> None:
        self._writer, self._files = writer, dict[str, BinaryIO]()
        if not writer:
            return
        with writing(workdir):
            (workdir / "tb").mkdir(parents=True, exist_ok=True)
            for name in LOGS:
                self._files[name] = (workdir / name).open("ab", buffering=0)
                self._files[name].truncate((sizes or {}).get(name, 0))
            file_name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
            self._events = RecordWriter(str(workdir / "tb" / file_name))
            self._add_event(file_version="brain.Event:2")
            self._add_event(
                step=done, session_log=SessionLog(status=SessionLog.START)
            )  # hides earlier events from here

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the metrics of a step; one that is not finite is null in JSON and absent in TensorBoard."""
        if not self._writer:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append("metrics.jsonl", [{"step": step, **finite}])
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in finite.items() if value is not None]
        with writing(self._events.path):
            self._add_event(step=step, summary=Summary(value=scalars))
            self._events.flush()

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs the scored responses of a step."""
        if self._writer:
            self._append("samples.jsonl", rows)

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends all rows or raises a Fault; the part that fitted on a full disk is dropped when the run resumes."""
        with writing(self._files[name].name):
            write_all(self._files[name].fileno(), encode_rows(rows))

    def _add_event(self, **fields: Any) -> None:
        self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer:
            for file in self._files.values():
                file.close()
            with writing(self._events.path) if kind is None else contextlib.suppress(OSError):  # else it was reported
                self._events.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Every step of metrics.jsonl."""
    return list(read_rows(workdir / "metrics.jsonl"))


def held_out_rewards(workdir: Path) -> dict[int, float]:
    """The mean reward of the held-out responses (eval/mean), by the step at which it was measured."""
    return {row["step"]: row["eval/mean"] for row in read_metrics(workdir) if row.get("eval/mean") is not None}
