"""What a run leaves to read: metrics.jsonl, samples.jsonl, TensorBoard, and the line that says what is happening."""

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import tensorboardX


class Log:
    """Appends one object per step to metrics.jsonl and TensorBoard, and scored responses to samples.jsonl.

    A run that resumes at step s drops what was written for steps from s on: it is about to write them again, the same.
    """

    def __init__(self, workdir: Path, resume_at: int, *, writes: bool = True) -> None:
        self._writes = writes
        if not writes:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        self._metrics = self._reopened(workdir / "metrics.jsonl", resume_at)
        self._samples = self._reopened(workdir / "samples.jsonl", resume_at)
        self._board = tensorboardX.SummaryWriter(str(workdir / "tb"), purge_step=resume_at)

    @staticmethod
    def _reopened(path: Path, resume_at: int) -> TextIO:
        if path.exists():
            kept = [line for line in whole_lines(path) if json.loads(line)["step"] < resume_at]
            replacement = path.with_suffix(".jsonl.new")
            replacement.write_text("".join(kept), encoding="utf-8")
            replacement.replace(path)
        return path.open("a", encoding="utf-8")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        if self._writes:
            measured = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
            self._metrics.write(json.dumps({"step": step, **measured}) + "\n")
            self._metrics.flush()
            for name, value in measured.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._writes:
            self._samples.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            self._samples.flush()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writes:
            self._metrics.close()
            self._samples.close()
            self._board.close()


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that end in a line break; a last one cut off by a crash is left out."""
    return [line + "\n" for line in path.read_text(encoding="utf-8").split("\n")[:-1]]  # splitlines would also cut at a response's U+2028


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """Every step of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in whole_lines(path)] if path.exists() else []


class Progress:
    """Says what is happening: on a terminal one line rewritten in place, elsewhere only what is worth keeping."""

    def __init__(self, total: int, done: int = 0, *, speaks: bool = True, stream: TextIO | None = None) -> None:
        self._stream, self._speaks = stream or sys.stderr, speaks
        self._terminal = self._stream.isatty()
        self._total, self._first, self._started = total, done, time.monotonic()

    def show(self, done: int, text: str) -> None:
        """A passing state after `done` of all steps, with the time left at the mean speed so far."""
        if self._terminal and self._speaks:
            self._stream.write(f"\r\x1b[2K{done}/{self._total}  {text}  {self._left(done)}")
            self._stream.flush()

    def keep(self, text: str) -> None:
        """A line that stays, on a terminal or not."""
        if self._speaks:
            self._stream.write(("\r\x1b[2K" if self._terminal else "") + text + "\n")
            self._stream.flush()

    def _left(self, done: int) -> str:
        if done <= self._first:
            return ""
        seconds = (time.monotonic() - self._started) / (done - self._first) * (self._total - done)
        return f"{clock(seconds)} left"


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss under an hour."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
