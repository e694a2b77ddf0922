"""The line that says what is happening and how long it will take; no jax."""

import sys
import time
from typing import TextIO


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
