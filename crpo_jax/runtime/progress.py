"""Progress messages of a run, with the time left; no jax."""

import sys
import time
from typing import TextIO


class Progress:
    """Prints lines that stay and, on a terminal, a status line that is rewritten in place."""

    def __init__(self, total: int, done: int = 0, *, enabled: bool = True, stream: TextIO | None = None) -> None:
        self._stream, self._enabled = stream or sys.stderr, enabled
        self._terminal = self._stream.isatty()
        self._total, self._first, self._started = total, done, time.monotonic()

    def update(self, done: int, text: str) -> None:
        """Rewrites the status line: steps done, the text, and the time left at the mean speed of this process."""
        if self._terminal and self._enabled:
            self._stream.write(f"\r\x1b[2K{done}/{self._total}  {text}  {self._time_left(done)}")
            self._stream.flush()

    def write(self, text: str) -> None:
        """Prints a line that stays, on a terminal or not."""
        if self._enabled:
            self._stream.write(("\r\x1b[2K" if self._terminal else "") + text + "\n")
            self._stream.flush()

    def _time_left(self, done: int) -> str:
        if done <= self._first:
            return ""
        seconds = (time.monotonic() - self._started) / (done - self._first) * (self._total - done)
        return f"{format_duration(seconds)} left"


def format_duration(seconds: float) -> str:
    """h:mm:ss, or m:ss under an hour."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
