"""A run asked to stop by a signal ends in good order."""

import os
import signal
from types import FrameType, TracebackType


class Stopped(Exception):
    """A part of the work was left, since the run was asked to stop; it comes again, the same."""


class Stop:
    """Turns the first SIGINT or SIGTERM (a TPU's preemption notice, Slurm's time limit) into a request; a second one ends the process at once.

    A run that is ended at once loses no more than one that is killed: what it did since its last checkpoint.
    """

    def __init__(self, doing: str = "finishing this part of the step, saving, then stopping") -> None:
        self.noted = False  # by this process, which is all that a command without jax needs to know
        self._doing = doing
        self._before: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether any process of the run was asked to stop; every process must ask at the same place."""
        from crpo_jax.parallel import (
            processes,  # here, because commands without a model stop in good order too, and need no jax
        )

        return processes.anywhere(self.noted)

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.noted:
            os.write(2, f"\n{name} again: stopped at once; the same command goes on from what is saved\n".encode())
            os._exit(128 + number)
        self.noted = True
        os.write(2, f"\n{name}: {self._doing}; once more stops at once\n".encode())

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
