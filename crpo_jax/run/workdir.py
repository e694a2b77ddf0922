"""The folder a run lives in: its config, and the signals that end a run in good order."""

import os
import signal
from pathlib import Path
from types import FrameType, TracebackType

from crpo_jax import config
from crpo_jax.config import Config, InputError

MAY_CHANGE = ("crpo.steps", "crpo.epochs", "parallel.", "run.save_every", "run.eval_every", "run.keep", "reward.workers", "reward.time_limit")
"""Settings that a resumed run may change: they decide how long or how fast it runs, not what it computes up to a step."""


def open_workdir(workdir: Path, settings: Config, *, writes: bool = True) -> None:
    """Makes the folder, or checks that the run in it has the same config; keeps the resolved config in config.yaml."""
    path = workdir / "config.yaml"
    if path.exists():
        changed = [line for line in config.differences(config.load(path), settings) if not line.startswith(MAY_CHANGE)]
        if changed:
            raise InputError(f"--workdir {workdir}: expected the config of the run it holds, got {'; '.join(changed)}. Take another --workdir")
    elif workdir.exists() and any(workdir.iterdir()):
        raise InputError(f"--workdir {workdir}: expected a new folder or one with a run's config.yaml, got a folder with other files")
    if writes:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".yaml.new")
            fresh.write_text(config.dump(settings), encoding="utf-8")
            os.replace(fresh, path)
        except OSError as error:
            raise InputError(f"--workdir {workdir}: cannot write: {error.strerror}") from None


class Stop:
    """Turns the first SIGINT or SIGTERM into a request to stop after this step; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
