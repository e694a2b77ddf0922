"""Stops a run cleanly on a signal."""

import os
import signal
from types import FrameType


class StopRequested(Exception):
    """Work was abandoned because the run was asked to stop; the resumed run repeats it identically."""


class StopSignal:
    """Records the first SIGINT or SIGTERM (TPU preemption, Slurm's time limit); a second one exits at once.

    Exiting at once loses no more than a kill does: the work since the last checkpoint.
    """

    def __init__(self, action: str = "finishing this part of the step, saving, then stopping") -> None:
        self.received = False  # by this process, which is all that a command without jax needs to know
        self._action = action
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether any process of the run received a signal; all processes must read this at the same point."""
        from crpo_jax.parallel.processes import any_process  # imports jax, which not every command needs

        return any_process(self.received)

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received:
            os.write(2, f"\n{name} again: exiting at once; the same command resumes from what is saved\n".encode())
            os._exit(128 + number)
        self.received = True
        os.write(2, f"\n{name}: {self._action}; a second signal exits at once\n".encode())

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
