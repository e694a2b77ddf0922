"""TensorBoard's event files, written record by record."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """tensorboardX imports torch where it is installed, for what no run uses: half of a command's start."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType] (an import of it fails, as where there is none)
    try:
        yield
    finally:
        del sys.modules["torch"]


with without_torch():
    from tensorboardX import RecordWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]


class EventFile:
    """A new file in a folder of event files; events of steps from `done` on in earlier ones are hidden.

    Every call writes, or raises an OSError: the thread behind tensorboardX's SummaryWriter dies of a full disk, and the
    run would then wait for it forever.
    """

    def __init__(self, folder: Path, done: int) -> None:
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self._records = RecordWriter(str(self.path))
        self._add(file_version="brain.Event:2")
        self._add(step=done, session_log=SessionLog(status=SessionLog.START))

    def add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=Summary(value=scalars))
        self._records.flush()

    def close(self) -> None:
        self._records.close()

    def _add(self, **fields: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())
