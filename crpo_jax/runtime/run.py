"""A training run in its workdir: CRPO and the cold start are both a loop over `TrainingRun.steps`."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from crpo_jax.errors import InputError
from crpo_jax.parallel.processes import barrier
from crpo_jax.rollout.engine import RolloutProgress
from crpo_jax.runtime import report
from crpo_jax.runtime.compilations import CompilationCounter
from crpo_jax.runtime.limits import LimitWatch
from crpo_jax.runtime.progress import Progress
from crpo_jax.runtime.runtime import Runtime
from crpo_jax.runtime.signals import StopSignal
from crpo_jax.store.checkpoint import Checkpoints, refuse_patterns
from crpo_jax.store.logs import Log
from crpo_jax.store.workdir import open_workdir
from crpo_jax.update.losses import Batch
from crpo_jax.update.trainer import Trainer, TrainState, Update


class TrainingRun:
    """The state of training and everything that happens around a step: resume, log, checkpoint, limits, stop.

    It continues after the newest whole checkpoint. Batches, random keys and schedules are functions of the step, so a
    resumed run computes what one that was never stopped would have computed.
    """

    def __init__(
        self, runtime: Runtime, workdir: Path, trainer: Trainer, state: TrainState, total: int, checkpoints: Checkpoints
    ) -> None:
        name = "crpo" if trainer.loss == "crpo" else "sft"
        self.runtime, self.workdir, self.trainer, self.total, self.checkpoints = (
            runtime,
            workdir,
            trainer,
            total,
            checkpoints,
        )
        self.done, log_sizes = checkpoints.find_resume_point()
        if self.done > total:
            raise InputError(f"{name}.steps: expected at least the {self.done} that {workdir} has done, got {total}")
        self.state = self.restored(self.done, state) if self.done else state
        self.finished, self._saved = False, self.done
        self.log = Log(workdir, self.done, log_sizes, writer=runtime.writes)
        self.progress = Progress(total, self.done, enabled=runtime.writes)
        self.limits = LimitWatch(runtime.settings, workdir, self.progress.write, name)
        self.stop, self._compilations = StopSignal(), CompilationCounter()

    def steps(self) -> Iterator[int]:
        """The steps that are left, and `total`, at which there is only an evaluation. Ends early where the run is to
        stop."""
        for step in range(self.done, self.total + 1):
            if self.finished or self.stopping:
                return
            self.log.check_in_place()
            yield step

    @property
    def stopping(self) -> bool:
        """Whether any process of the run was asked to stop; every process must ask at the same place."""
        return self.stop.requested

    def show_rollout(self, step: int) -> Callable[[RolloutProgress], None]:
        """Shows how far a rollout of this step is."""
        return lambda tally: self.progress.update(step, report.rollout_line(tally))

    def finish(self, step: int, measures: Mapping[str, float]) -> None:
        """The last evaluation: there is no step after it."""
        self.log.step(step, measures)
        self.finished = True

    def keep(
        self,
        step: int,
        measures: Mapping[str, float],
        line: str,
        updates: Sequence[Update],
        mini_batches: Sequence[Sequence[Batch]],
        *,
        save: bool,
        samples: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Logs a step, holds it to the run's limits and saves a checkpoint where one is due."""
        self.log.check_in_place()
        self.log.samples(samples)
        self.log.step(step, {**measures, "time/compilations": self._compilations.count_new()})
        self.progress.update(step + 1, line)
        self.limits.check_updates(step, updates, mini_batches, self.trainer, self.state)
        self.limits.check_measures(step, measures)
        self.done = step + 1
        if save or self.done == self.total:
            self.save()
        self.checkpoints.raise_failure()

    def save(self) -> None:
        """A checkpoint, written in the background; nothing where this step has one."""
        if self.done != self._saved:
            self.log.check_in_place()
            self.checkpoints.save(self.done, self.state._replace(frozen=None))
            self._saved = self.done

    def restored(self, step: int, like: TrainState) -> TrainState:
        """The state after `step` steps, with the frozen weights that are in memory already."""
        return self.checkpoints.restore(step, like._replace(frozen=None))._replace(frozen=like.frozen)

    def conclude(self, text: Callable[[], str]) -> None:
        """The last words: the closing table, or where to resume."""
        if self.runtime.writes:
            stopped = f"stopped after step {self.done} of {self.total}; the same command resumes from there"
            self.progress.write(text() if self.finished else stopped)


@contextlib.contextmanager
def open_run(
    runtime: Runtime, workdir: Path, trainer: Trainer, state: TrainState, total: int, checkpoints: Checkpoints
) -> Iterator[TrainingRun]:
    """The run in a workdir, resumed where it has checkpoints; its last state is saved unless the body raises."""
    run = TrainingRun(runtime, workdir, trainer, state, total, checkpoints)
    del state  # a resumed run has its own: this one would stay on the devices as long as the run
    with run.stop, run.log, run.checkpoints, run.progress:
        yield run
        if run.done:
            run.save()


@contextlib.contextmanager
def shared_workdir(runtime: Runtime, workdir: Path, *, allow_changes: bool) -> Iterator[None]:
    """Locks the workdir for this run, which `require_same_workdir` was asked about; InputError where it holds a run of
    another config, or a process does not see it."""
    refuse_patterns(workdir)
    with open_workdir(workdir, runtime.settings, writer=runtime.writes, allow_changes=allow_changes):
        barrier("the workdir is open")
        if not (workdir / "config.yaml").exists():
            raise InputError(
                f"--workdir {workdir}: expected a folder on a disk that all processes share, "
                "got one that only the first process sees"
            )
        yield
