"""Progress messages of a run, with the time left; no jax."""

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

LINE_STEPS, LINE_SHARE = 5, 0.01
"""Where a status line cannot be rewritten, in a log file or a pipe: steps from one line to the next, and the same as a
share of a long run."""

LINE_SECONDS = 60.0
"""The longest time from one line to the next, also in a long rollout, evaluation or compilation."""


class Progress:
    """Prints lines that stay, and a status that is rewritten in place on a terminal.

    Elsewhere it is a line every few steps and every minute, in a `with` block even while nobody reports anything.
    """

    def __init__(self, total: int, done: int = 0, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._stream, self._enabled = stream or sys.stderr, enabled
        self._terminal = self._stream.isatty()
        self._total, self._first, self._started = total, done, time.monotonic()
        self._first_report: tuple[int, float] | None = None  # steps done, and when
        self._done, self._text, self._updated = done, "starting", self._started
        self._lines_done, self._line_at = done, self._started
        self._lock, self._left = threading.Lock(), threading.Event()

    def __enter__(self) -> "Progress":
        if self._enabled and not self._terminal:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._left.set()

    def _watch(self) -> None:
        while not self._left.wait(max(self._line_at + LINE_SECONDS - time.monotonic(), 0.01)):
            self._line_if_due()

    def update(self, done: int, text: str) -> None:
        """The status: steps done, the text, and the time left at the mean speed of this process."""
        self._done, self._text, self._updated = done, text, time.monotonic()
        if done > self._first and self._first_report is None:
            self._first_report = (done, self._updated)
        if self._enabled and self._terminal:
            self._stream.write(f"\r\x1b[2K{done}/{self._total}  {text}  {self._time_left()}")
            self._stream.flush()
        elif self._enabled:
            self._line_if_due()

    def write(self, text: str) -> None:
        """Prints a line that stays, on a terminal or not."""
        if self._enabled:
            with self._lock:
                self._write_line(("\r\x1b[2K" if self._terminal else "") + text)

    def _write_line(self, line: str) -> None:
        self._line_at = time.monotonic()
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def _line_if_due(self) -> None:
        with self._lock:
            now, steps = time.monotonic(), self._done - self._lines_done
            if steps < max(LINE_STEPS, LINE_SHARE * self._total) and now - self._line_at < LINE_SECONDS:
                return
            silence = now - self._updated
            parts = [f"{self._done}/{self._total}", self._text, self._time_left()]
            if silence >= LINE_SECONDS / 2:
                parts.append(f"nothing new for {format_duration(silence)}: computing or compiling")
            self._lines_done = self._done
            self._write_line("  ".join(part for part in parts if part))

    def _time_left(self) -> str:
        """By the steps after those of the first report, in which programs are compiled, or by these, which is said."""
        if self._first_report is None or self._done <= self._first:
            return ""
        done, at = self._first_report
        if self._done <= done:
            seconds = (at - self._started) / (done - self._first) * (self._total - done)
            return f"first estimate {format_duration(seconds)} left"
        seconds = (time.monotonic() - at) / (self._done - done) * (self._total - self._done)
        return f"{format_duration(seconds)} left"


def format_duration(seconds: float) -> str:
    """h:mm:ss, or m:ss under an hour."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
